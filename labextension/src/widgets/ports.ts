import { InputDialog } from '@jupyterlab/apputils';

import type { ITarget } from './memory';
import { orSayWhy } from './saying';

/** What most development servers listen on. */
const USUAL = 8000;
const MOST = 65535;

/** Ask for a port of a sandbox and open what listens there in a tab; if that cannot be, say why. */
export async function openPort({ id, name, sandboxes, trans }: ITarget): Promise<void> {
  const { button, value } = await InputDialog.getNumber({
    title: trans.__('Open a Web Port of %1', name),
    label: trans.__('The port on which a web server in the sandbox listens:'),
    value: USUAL,
    okLabel: trans.__('Open')
  });
  if (!button.accept || value === null) {
    return;
  }
  await orSayWhy(name, async () => {
    const port = Math.min(MOST, Math.max(1, Math.trunc(value)));
    window.open(await sandboxes.portUrl(id, port), '_blank', 'noopener,noreferrer');
  });
}
