import * as React from 'react';

/** To be given to the element around what comes and goes. */
export interface IFocusHandlers {
  readonly onFocus: (event: React.FocusEvent<HTMLElement>) => void;
  readonly onBlur: (event: React.FocusEvent<HTMLElement>) => void;
}

/**
 * Notices when what has the focus goes from the page with a change of it: a browser then leaves the keyboard nowhere.
 *
 * @param where - What is to be remembered of an element that has the focus.
 * @param onLost - Called after the change with what was remembered; is to focus something near.
 */
export function useFocusLoss<T>(
  where: (element: HTMLElement) => T,
  onLost: (place: T) => void
): IFocusHandlers {
  const held = React.useRef<{ readonly element: HTMLElement; readonly place: T } | null>(null);
  React.useLayoutEffect(() => {
    const was = held.current;
    if (was !== null && !was.element.isConnected) {
      held.current = null;
      if (document.activeElement === null || document.activeElement === document.body) {
        onLost(was.place);
      }
    }
  });
  return {
    onFocus: ({ target }) => {
      held.current = { element: target, place: where(target) };
    },
    onBlur: ({ relatedTarget }) => {
      if (relatedTarget !== null) {
        held.current = null; // It went somewhere by itself.
      }
    }
  };
}
