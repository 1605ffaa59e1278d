import * as React from 'react';

const WIDTH = 36;
const HEIGHT = 16;

/** How many points fill the width. */
const POINTS = 40;

/** A small line of how something went of late; what it says is written beside it. */
export function Sparkline(props: { readonly points: readonly number[] }): React.JSX.Element {
  const step = WIDTH / (POINTS - 1);
  const points = props.points.slice(-POINTS);
  const from = WIDTH - step * (points.length - 1);
  const line = points
    .map(
      (point, n) =>
        `${(from + n * step).toFixed(1)},${(HEIGHT - 1 - point * (HEIGHT - 2)).toFixed(1)}`
    )
    .join(' ');
  return (
    <svg className="wc-Sparkline" width={WIDTH} height={HEIGHT} aria-hidden="true">
      <polygon points={`${from.toFixed(1)},${HEIGHT} ${line} ${WIDTH},${HEIGHT}`} />
      <polyline points={line} />
    </svg>
  );
}
