import type { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

import { waterfall } from '../model/waterfall';
import * as words from '../model/words';

export interface IWaterfallProps {
  readonly phases_ms: Readonly<Record<string, number>>;
  readonly trans: TranslationBundle;
}

/** What a start spent its time on: a bar for each part, one after the other. Nothing if that is not known. */
export function Waterfall({ phases_ms, trans }: IWaterfallProps): React.JSX.Element | null {
  const bars = waterfall(phases_ms, trans);
  if (bars.length === 0) {
    return null;
  }
  return (
    <table className="wc-Waterfall" aria-label={trans.__('What the start spent its time on')}>
      <tbody>
        {bars.map(({ phase, label, ms, from_pct, width_pct }) => (
          <tr key={phase} data-phase={phase}>
            <th scope="row">{label}</th>
            <td className="wc-Waterfall-track">
              <span
                className="wc-Waterfall-bar"
                style={{ marginLeft: `${from_pct}%`, width: `${width_pct}%` }}
              />
            </td>
            <td className="wc-Waterfall-ms">{words.milliseconds(ms)}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}
