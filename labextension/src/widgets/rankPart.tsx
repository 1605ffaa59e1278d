import { type IRenderMimeRegistry, MimeModel } from '@jupyterlab/rendermime';
import type { IRenderMime } from '@jupyterlab/rendermime-interfaces';
import { JSONExt, type ReadonlyPartialJSONObject } from '@lumino/coreutils';
import { MessageLoop } from '@lumino/messaging';
import { Widget } from '@lumino/widgets';
import * as React from 'react';

import type { Part } from '../model/ranks';

export interface IRankPartProps {
  readonly part: Part;
  readonly isTrusted: boolean;
  readonly rendermime: IRenderMimeRegistry;
}

interface IDrawn {
  readonly mimeType: string;
  readonly renderer: IRenderMime.IRenderer;
  data: ReadonlyPartialJSONObject;
  /** What may be drawn, a script for one, depends on it. */
  readonly isTrusted: boolean;
}

/** Something that a rank has printed or displayed, drawn as JupyterLab draws it in a cell. */
export function RankPart({ part, isTrusted, rendermime }: IRankPartProps): React.JSX.Element {
  const host = React.useRef<HTMLDivElement>(null);
  const drawn = React.useRef<IDrawn | null>(null);
  const data =
    part.kind === 'data' ? part.data : { [`application/vnd.jupyter.${part.name}`]: part.text };
  const metadata = part.kind === 'data' ? part.metadata : {};

  React.useLayoutEffect(() => {
    const mimeType = rendermime.preferredMimeType(data, isTrusted ? 'any' : 'ensure');
    const { current } = drawn;
    if (current !== null && (current.mimeType !== mimeType || current.isTrusted !== isTrusted)) {
      drawn.current = removed(current);
    }
    if (host.current === null || mimeType === undefined) {
      return;
    }
    if (drawn.current !== null && JSONExt.deepEqual(drawn.current.data, data)) {
      return;
    }
    drawn.current ??= added(host.current, mimeType, isTrusted, rendermime);
    drawn.current.data = data;
    void drawn.current.renderer.renderModel(new MimeModel({ data, metadata, trusted: isTrusted }));
  });

  React.useLayoutEffect(
    () => () => {
      drawn.current = drawn.current && removed(drawn.current);
    },
    []
  );

  return (
    <div
      ref={host}
      className="wc-Rank-part jp-OutputArea-output"
      data-mime-type={part.kind === 'text' ? `application/vnd.jupyter.${part.name}` : undefined}
    />
  );
}

/** A renderer below this element, which React has put into the page. */
function added(
  host: HTMLElement,
  mimeType: string,
  isTrusted: boolean,
  rendermime: IRenderMimeRegistry
): IDrawn {
  const renderer = rendermime.createRenderer(mimeType);
  MessageLoop.sendMessage(renderer, Widget.Msg.BeforeAttach);
  host.appendChild(renderer.node);
  MessageLoop.sendMessage(renderer, Widget.Msg.AfterAttach);
  return { mimeType, renderer, data: {}, isTrusted };
}

function removed({ renderer }: IDrawn): null {
  if (renderer.isAttached) {
    MessageLoop.sendMessage(renderer, Widget.Msg.BeforeDetach);
    renderer.node.remove();
    MessageLoop.sendMessage(renderer, Widget.Msg.AfterDetach);
  }
  renderer.dispose();
  return null;
}
