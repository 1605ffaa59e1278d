import * as React from 'react';

import type { IBadge } from '../model/glance';

/** The marks of a sandbox, each with its reason as a tooltip. */
export function Badges(props: { readonly badges: readonly IBadge[] }): React.JSX.Element {
  return (
    <>
      {props.badges.map(({ id, tone, label, title }) => (
        <span key={id} className={`wc-Badge wc-mod-${tone}`} data-badge={id} title={title}>
          {label}
        </span>
      ))}
    </>
  );
}
