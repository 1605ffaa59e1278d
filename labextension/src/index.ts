import type { JupyterFrontEndPlugin } from '@jupyterlab/application';

import { banner } from './plugins/banner';
import { launcher } from './plugins/launcher';
import { memory } from './plugins/memory';
import { meters } from './plugins/meters';
import { notices } from './plugins/notices';
import { panel } from './plugins/panel';
import { picker } from './plugins/picker';
import { ranks } from './plugins/ranks';
import { sandboxes } from './plugins/sandboxes';
import { toolbar } from './plugins/toolbar';
import { usage } from './plugins/usage';
import { waking } from './plugins/waking';

export type * from './forms';
export * from './tokens';

const plugins: JupyterFrontEndPlugin<unknown>[] = [
  sandboxes,
  usage,
  toolbar,
  banner,
  picker,
  launcher,
  memory,
  meters,
  panel,
  notices,
  ranks,
  waking
];

export default plugins;
