import type { TranslationBundle } from '@jupyterlab/translation';
import { closeIcon, ReactWidget } from '@jupyterlab/ui-components';
import type { Message } from '@lumino/messaging';
import * as React from 'react';

import type { NotebookSandbox } from '../model/notebook';
import type { INotice, NoticeAction } from '../model/notices';
import * as words from '../model/words';
import { applyChoice } from './apply';
import { useFocusLoss } from './focus';
import { leaveQueue, resume, targetOf } from './memory';
import { Prose } from './prose';

export interface IBannerOptions {
  readonly notebook: NotebookSandbox;
  /** Choose what the sandbox gets. */
  readonly choose: () => void;
  /** Give the keyboard back to the notebook. */
  readonly leave: () => void;
  /** Keys of notices that were dismissed anywhere on this page. */
  readonly dismissed: Set<string>;
}

/**
 * Explanations below the notebook's toolbar: what a start waits for, why it failed, and the cure.
 */
export class SandboxBanner extends ReactWidget {
  constructor(options: IBannerOptions) {
    super();
    this._options = options;
    this.addClass('wc-Banner');
    options.notebook.changed.connect(this.update, this);
    this._size = new ResizeObserver(() => {
      this._fit();
    });
  }

  override dispose(): void {
    this._size.disconnect();
    super.dispose();
  }

  protected override onAfterAttach(message: Message): void {
    super.onAfterAttach(message);
    void this.renderPromise?.then(() => {
      const content = this.node.firstElementChild;
      if (content !== null) {
        this._size.observe(content);
      }
    });
  }

  protected override render(): React.JSX.Element {
    const { notebook, dismissed } = this._options;
    return (
      <div className="wc-Banner-content">
        <Notices leave={this._options.leave}>
          {notebook.notices
            .filter(({ key }) => !dismissed.has(key))
            .map(notice => this._notice(notice))}
        </Notices>
      </div>
    );
  }

  private _notice(notice: INotice): React.JSX.Element {
    const { notebook, dismissed } = this._options;
    const { trans } = notebook;
    return (
      <div
        key={notice.key}
        className={`wc-Notice wc-mod-${notice.tone}`}
        role={notice.tone === 'error' ? 'alert' : 'status'}
      >
        <div className="wc-Notice-text">
          <span className="wc-Notice-what">
            <Prose text={notice.text} />
          </span>
          {notice.elapsed_s !== null && (
            // A screen reader hears of the matter once, not each second.
            <span className="wc-Notice-time" role="timer" aria-live="off">
              {' '}
              {words.seconds(notice.elapsed_s)}
            </span>
          )}
          {notice.cure !== '' && (
            <span className="wc-Notice-cure">
              <Prose text={notice.cure} />
            </span>
          )}
        </div>
        <div className="wc-Notice-actions">
          {notice.actions.map(action => (
            <button
              key={action}
              type="button"
              className="jp-mod-styled jp-mod-minimal wc-Notice-button"
              onClick={() => {
                this._act(action);
              }}
            >
              {actionLabel(action, trans)}
            </button>
          ))}
          <button
            type="button"
            className="wc-Notice-close"
            title={trans.__('Dismiss')}
            aria-label={trans.__('Dismiss')}
            onClick={() => {
              dismissed.add(notice.key);
              this.update();
            }}
          >
            <closeIcon.react tag="span" className="wc-Notice-closeIcon" />
          </button>
        </div>
      </div>
    );
  }

  private _act(action: NoticeAction): void {
    const { notebook, choose } = this._options;
    const target = targetOf(notebook);
    switch (action) {
      case 'retry':
      case 'restart':
        // JupyterLab and the next notice show why it failed again.
        notebook.restart().catch(() => undefined);
        return;
      case 'resume':
      case 'wake':
        void (target && resume(target));
        return;
      case 'cancel':
        void (target && leaveQueue(target));
        return;
      case 'apply':
        void applyChoice(notebook, notebook.choice);
        return;
      case 'choose':
        choose();
    }
  }

  /** The layout above places by minimal heights, so this one follows its content's. */
  private _fit(): void {
    const height = this.node.firstElementChild?.scrollHeight ?? 0;
    this.node.style.minHeight = `${height}px`;
    this.parent?.fit();
  }

  private readonly _options: IBannerOptions;
  private readonly _size: ResizeObserver;
}

/** What is told. With the notice whose button was pressed the keyboard goes to the next one, or to the notebook. */
function Notices(props: {
  readonly leave: () => void;
  readonly children: readonly React.JSX.Element[];
}): React.JSX.Element {
  const all = React.useRef<HTMLDivElement>(null);
  const handlers = useFocusLoss(
    () => null,
    () => {
      const next = all.current?.querySelector('button') ?? null;
      if (next === null) {
        props.leave();
      } else {
        next.focus();
      }
    }
  );
  return (
    <div ref={all} {...handlers}>
      {props.children}
    </div>
  );
}

function actionLabel(action: NoticeAction, trans: TranslationBundle): string {
  switch (action) {
    case 'retry':
    case 'resume':
      return trans.__('Try again');
    case 'wake':
      return trans.__('Resume');
    case 'cancel':
      return trans.__('Cancel');
    case 'restart':
      return trans.__('Restart');
    case 'apply':
      return trans.__('Restart with it');
    case 'choose':
      return trans.__('Change…');
  }
}
