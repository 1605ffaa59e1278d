import type { JupyterFrontEndPlugin } from '@jupyterlab/application';

import { banner } from './plugins/banner';
import { clones } from './plugins/clones';
import { memory } from './plugins/memory';
import { notices } from './plugins/notices';
import { picker } from './plugins/picker';
import { sandboxes } from './plugins/sandboxes';
import { toolbar } from './plugins/toolbar';

export * from './tokens';

const plugins: JupyterFrontEndPlugin<unknown>[] = [
  sandboxes,
  toolbar,
  banner,
  picker,
  memory,
  clones,
  notices
];

export default plugins;
