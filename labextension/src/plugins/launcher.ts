import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ILauncher } from '@jupyterlab/launcher';
import type { Contents, KernelSpec } from '@jupyterlab/services';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { METADATA_KEY, writeChoice } from '../model/choice';
import { HIDDEN } from '../model/glance';
import { isOurs } from '../model/notebook';
import { CommandIDs, DOMAIN, ISandboxes } from '../tokens';
import { sandboxIcon } from '../widgets/icons';
import { pick } from '../widgets/picker';
import { orSayWhy } from '../widgets/saying';

/** The kernelspec that a new notebook gets, if there are several of ours. */
const USUAL = 'warmcell';

/**
 * A card in the launcher: a new notebook, for which hardware is chosen before its kernel starts.
 */
export const launcher: JupyterFrontEndPlugin<void> = {
  id: '@warmcell/labextension:launcher',
  description: 'Starts new notebooks on chosen hardware.',
  autoStart: true,
  requires: [ISandboxes, ILauncher],
  optional: [ITranslator],
  activate: (
    app: JupyterFrontEnd,
    sandboxes: ISandboxes,
    cards: ILauncher,
    translator: ITranslator | null
  ): void => {
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    const { contents, kernelspecs } = app.serviceManager;

    const ours = (): KernelSpec.ISpecModel | undefined => {
      const specs = Object.values(kernelspecs.specs?.kernelspecs ?? {}).filter(isOurs);
      return specs.find(spec => spec?.name === USUAL) ?? specs[0];
    };

    app.commands.addCommand(CommandIDs.newNotebook, {
      label: trans.__('Choose GPU…'),
      caption: trans.__(
        'A new notebook in a sandbox with the GPU, memory and network of your choice'
      ),
      icon: sandboxIcon,
      isVisible: () => ours() !== undefined,
      describedBy: {
        args: {
          type: 'object',
          properties: {
            cwd: { type: 'string', description: trans.__('The folder; the root if absent') }
          }
        }
      },
      execute: async args => {
        const spec = ours();
        const picked =
          spec === undefined
            ? null
            : await pick({
                name: trans.__('a new notebook'),
                choice: {},
                hasKernel: false,
                sandbox: null,
                glance: HIDDEN,
                sandboxes,
                trans
              });
        let opened: unknown;
        if (spec !== undefined && picked !== null) {
          await orSayWhy(trans.__('New notebook'), async () => {
            const path = typeof args.cwd === 'string' ? args.cwd : '';
            const made: Contents.IModel = await contents.newUntitled({ path, type: 'notebook' });
            const { name, display_name, language } = spec;
            await contents.save(made.path, {
              type: 'notebook',
              format: 'json',
              content: {
                cells: [],
                metadata: {
                  kernelspec: { name, display_name, language },
                  [METADATA_KEY]: writeChoice(picked.choice)
                },
                nbformat: 4,
                nbformat_minor: 5
              }
            });
            opened = await app.commands.execute('docmanager:open', {
              path: made.path,
              factory: 'Notebook',
              kernel: { name }
            });
          });
        }
        return opened; // A card that returns a widget is replaced by it.
      }
    });
    cards.add({
      command: CommandIDs.newNotebook,
      category: trans.__('Notebook'),
      rank: 1
    });
  }
};
