import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { IRenderMimeRegistry } from '@jupyterlab/rendermime';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { RANKS_TYPE } from '../model/ranks';
import { DOMAIN } from '../tokens';
import { Ranks } from '../widgets/ranks';

/** Before HTML, which comes with it for front ends that do not know it. */
const RANK = 10;

/**
 * Draws what the ranks of a `%%remote` cell show.
 */
export const ranks: JupyterFrontEndPlugin<void> = {
  id: '@warmcell/labextension:ranks',
  description: 'Draws what the ranks of a remote cell show.',
  autoStart: true,
  requires: [IRenderMimeRegistry],
  optional: [ITranslator],
  activate: (
    _: JupyterFrontEnd,
    rendermime: IRenderMimeRegistry,
    translator: ITranslator | null
  ): void => {
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    rendermime.addFactory(
      {
        safe: true,
        mimeTypes: [RANKS_TYPE],
        defaultRank: RANK,
        createRenderer: ({ resolver }) =>
          new Ranks({ rendermime: rendermime.clone({ resolver: resolver ?? undefined }), trans })
      },
      RANK
    );
  }
};
