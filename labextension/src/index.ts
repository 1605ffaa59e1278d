import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ISettingRegistry } from '@jupyterlab/settingregistry';

/**
 * The settings of the extension; each feature is a plugin of its own beside it.
 */
const settings: JupyterFrontEndPlugin<void> = {
  id: '@warmcell/labextension:plugin',
  description: 'Loads the settings of Warmcell.',
  autoStart: true,
  requires: [ISettingRegistry],
  activate: async (_app: JupyterFrontEnd, registry: ISettingRegistry): Promise<void> => {
    await registry.load(settings.id);
  }
};

const plugins: JupyterFrontEndPlugin<unknown>[] = [settings];

export default plugins;
