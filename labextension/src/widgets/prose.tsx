import * as React from 'react';

/** A sentence in which `commands` between backticks look like commands. */
export function Prose(props: { readonly text: string }): React.JSX.Element {
  return (
    <>
      {props.text
        .split(/`([^`]+)`/)
        .map((part, n) => (n % 2 === 0 ? part : <code key={n}>{part}</code>))}
    </>
  );
}
