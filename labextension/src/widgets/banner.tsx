import { closeIcon, ReactWidget, UseSignal } from '@jupyterlab/ui-components';
import type { Message } from '@lumino/messaging';
import * as React from 'react';

import type { NotebookSandbox } from '../model/notebook';
import type { INotice } from '../model/notices';
import * as words from '../model/words';
import { applyChoice } from './apply';
import { resume } from './memory';
import { Prose } from './prose';

export interface IBannerOptions {
  readonly notebook: NotebookSandbox;
  /** Choose what the sandbox gets. */
  readonly choose: () => void;
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
        <UseSignal signal={notebook.changed} initialSender={notebook}>
          {() => (
            <>
              {notebook.notices
                .filter(({ key }) => !dismissed.has(key))
                .map(notice => this._notice(notice))}
            </>
          )}
        </UseSignal>
      </div>
    );
  }

  private _notice(notice: INotice): React.JSX.Element {
    const { notebook, choose, dismissed } = this._options;
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
          {notice.actions.includes('retry') && (
            <button
              type="button"
              className="jp-mod-styled jp-mod-minimal wc-Notice-button"
              onClick={() => {
                this._retry();
              }}
            >
              {trans.__('Try again')}
            </button>
          )}
          {notice.actions.includes('resume') && (
            <button
              type="button"
              className="jp-mod-styled jp-mod-minimal wc-Notice-button"
              onClick={() => {
                void resume(notebook);
              }}
            >
              {trans.__('Try again')}
            </button>
          )}
          {notice.actions.includes('restart') && (
            <button
              type="button"
              className="jp-mod-styled jp-mod-minimal wc-Notice-button"
              onClick={() => {
                this._retry();
              }}
            >
              {trans.__('Restart')}
            </button>
          )}
          {notice.actions.includes('apply') && (
            <button
              type="button"
              className="jp-mod-styled jp-mod-minimal wc-Notice-button"
              onClick={() => {
                void applyChoice(notebook, notebook.choice);
              }}
            >
              {trans.__('Restart with it')}
            </button>
          )}
          {notice.actions.includes('choose') && (
            <button
              type="button"
              className="jp-mod-styled jp-mod-minimal wc-Notice-button"
              onClick={choose}
            >
              {trans.__('Change…')}
            </button>
          )}
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

  private _retry(): void {
    // JupyterLab and the next notice show why it failed again.
    this._options.notebook.restart().catch(() => undefined);
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
