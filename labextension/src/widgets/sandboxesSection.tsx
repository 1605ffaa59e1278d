import type { TranslationBundle } from '@jupyterlab/translation';
import {
  closeIcon,
  type LabIcon,
  launchIcon,
  pauseIcon,
  runIcon,
  saveIcon
} from '@jupyterlab/ui-components';
import { ReactWidget } from '@jupyterlab/ui-components';
import type { Message } from '@lumino/messaging';
import type { ISignal } from '@lumino/signaling';
import * as React from 'react';

import { entries, type EntryAction, type IEntry } from '../model/entries';
import * as words from '../model/words';
import type { ISandboxes, IUsageFeed } from '../tokens';
import { Badges } from './badges';
import { useFocusLoss } from './focus';
import { failedIcon, forkIcon, parkIcon, sandboxIcon, suspendedIcon } from './icons';
import { Waterfall } from './waterfall';

/** The most that the section takes of the sidebar before it scrolls. */
const MOST_PX = 320;

/** Ages are shown in these steps at the finest. */
const TICK_MS = 5000;

export interface ISectionOptions {
  readonly sandboxes: ISandboxes;
  readonly usage: IUsageFeed;
  /** The open notebook of a kernel, relative to the server's root; null if it has none. */
  readonly pathOf: (kernelId: string | null) => string | null;
  /** Emitted when those may have changed. */
  readonly pathsChanged: ISignal<unknown, unknown>;
  readonly act: (entry: IEntry, action: EntryAction) => void;
  readonly open: (entry: IEntry) => void;
  readonly trans: TranslationBundle;
}

/**
 * The section of the sidebar for running things that lists sandboxes.
 */
export class SandboxesSection extends ReactWidget {
  constructor(options: ISectionOptions) {
    super();
    const { sandboxes, usage, pathsChanged, trans } = (this._options = options);
    this.id = 'warmcell-sandboxes';
    this.addClass('wc-Sandboxes');
    this.title.label = trans.__('Sandboxes');
    this._size = new ResizeObserver(() => {
      this._grow();
    });
    sandboxes.changed.connect(this._onChanged, this);
    usage.changed.connect(this._onChanged, this);
    pathsChanged.connect(this._onChanged, this);
  }

  override dispose(): void {
    const { sandboxes, usage, pathsChanged } = this._options;
    sandboxes.changed.disconnect(this._onChanged, this);
    usage.changed.disconnect(this._onChanged, this);
    pathsChanged.disconnect(this._onChanged, this);
    window.clearInterval(this._ticker);
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

  protected override onAfterShow(message: Message): void {
    super.onAfterShow(message);
    this.update();
    this._ticker = window.setInterval(() => {
      this.update();
    }, TICK_MS);
  }

  protected override onAfterHide(message: Message): void {
    super.onAfterHide(message);
    window.clearInterval(this._ticker);
  }

  protected override render(): React.JSX.Element {
    const { sandboxes, usage, pathOf, trans } = this._options;
    const around = { pathOf, usageOf: (id: string) => usage.of(id), now: sandboxes.now() };
    const rows = entries(sandboxes.all, around, trans);
    if (rows.length === 0) {
      return (
        <div>
          <p className="wc-Sandboxes-none">
            {trans.__('None. A notebook whose kernel is Python 3 (Warmcell) has one.')}
          </p>
        </div>
      );
    }
    return (
      <div>
        <Rows rows={rows} {...this._options} />
      </div>
    );
  }

  /** Sections of that sidebar share its height equally, but for their minima. */
  private _grow(): void {
    const content = this.node.firstElementChild?.scrollHeight ?? 0;
    this.node.style.minHeight = `${Math.min(MOST_PX, content)}px`;
    this.parent?.fit();
  }

  private _onChanged(): void {
    if (this.isVisible) {
      this.update();
    }
  }

  private readonly _options: ISectionOptions;
  private readonly _size: ResizeObserver;
  private _ticker = 0;
}

/** All rows. What was done with one often takes its button away, or the row: the keyboard stays near. */
function Rows({
  rows,
  ...options
}: ISectionOptions & { readonly rows: readonly IEntry[] }): React.JSX.Element {
  const list = React.useRef<HTMLUListElement>(null);
  const handlers = useFocusLoss(
    element => {
      const row = element.closest<HTMLElement>('[data-sandbox]');
      const all = [...(list.current?.children ?? [])];
      return { id: row?.dataset.sandbox, at: row === null ? 0 : all.indexOf(row) };
    },
    ({ id, at }) => {
      const all = [...(list.current?.querySelectorAll<HTMLElement>('[data-sandbox]') ?? [])];
      const near = all.find(row => row.dataset.sandbox === id) ?? all[at] ?? all.at(-1);
      near?.querySelector('summary')?.focus();
    }
  );
  return (
    <ul
      className="wc-Sandboxes-list"
      ref={list}
      aria-label={options.trans.__('Sandboxes')}
      {...handlers}
    >
      {rows.map(entry => (
        <Row key={entry.sandbox.id} entry={entry} {...options} />
      ))}
    </ul>
  );
}

interface IRowProps extends ISectionOptions {
  readonly entry: IEntry;
}

function Row({ entry, act, open, usage, trans }: IRowProps): React.JSX.Element {
  const { sandbox, name, tone, state, facts, badges, actions, path } = entry;
  const Icon = { failed: failedIcon, resting: suspendedIcon }[tone as string] ?? sandboxIcon;
  return (
    <li className={`wc-Sandboxes-row wc-mod-${tone}`} data-sandbox={sandbox.id}>
      <div className="wc-Sandboxes-head">
        <Icon.react tag="span" className="wc-Sandboxes-icon" />
        {path === null ? (
          <span className="wc-Sandboxes-name" title={sandbox.notebook ?? sandbox.id}>
            {name}
          </span>
        ) : (
          <button
            type="button"
            className="wc-Sandboxes-name"
            title={entry.isClone ? trans.__('Open as a copy of %1', path) : path}
            onClick={() => {
              open(entry);
            }}
          >
            {name}
          </button>
        )}
        <span className="wc-Sandboxes-actions">
          {actions.map(action => (
            <ActionButton
              key={action}
              action={action}
              name={name}
              trans={trans}
              onClick={() => {
                act(entry, action);
              }}
            />
          ))}
        </span>
      </div>
      <details className="wc-Sandboxes-more">
        <summary>
          <span className="wc-Sandboxes-state">{state}</span>
          {facts.map(fact => (
            <span key={fact} className="wc-Sandboxes-fact">
              {fact}
            </span>
          ))}
          <Badges badges={badges} />
        </summary>
        <Details entry={entry} usage={usage} trans={trans} />
      </details>
    </li>
  );
}

/** What a start took, what it uses now, and what it was given. */
function Details({
  entry: { sandbox },
  usage,
  trans
}: {
  readonly entry: IEntry;
  readonly usage: IUsageFeed;
  readonly trans: TranslationBundle;
}): React.JSX.Element {
  const used = usage.of(sandbox.id);
  const how = words.started(sandbox, trans);
  return (
    <div className="wc-Sandboxes-details">
      {sandbox.error !== null && (
        <p className="wc-Sandboxes-error">
          {words.sentence(sandbox.error.message)} {words.sentence(sandbox.error.hint)}
        </p>
      )}
      {how !== '' && (
        <p>
          {words.wokeFrom(sandbox) === null
            ? trans.__('Started from: %1', how)
            : trans.__('Went on: %1', how)}
        </p>
      )}
      <Waterfall phases_ms={sandbox.phases_ms} trans={trans} />
      {used !== null && <p>{words.usage(used, trans).join(' · ')}</p>}
      <p>{[sandbox.backend, ...words.facts(sandbox, trans)].join(' · ')}</p>
      <p className="wc-Sandboxes-id">{sandbox.id}</p>
    </div>
  );
}

function ActionButton(props: {
  readonly action: EntryAction;
  readonly name: string;
  readonly trans: TranslationBundle;
  readonly onClick: () => void;
}): React.JSX.Element {
  const { action, name, trans, onClick } = props;
  const Icon = ICONS[action];
  const label = actionLabel(action, name, trans);
  return (
    <button
      type="button"
      className="wc-Sandboxes-action"
      data-action={action}
      title={label}
      aria-label={label}
      onClick={onClick}
    >
      <Icon.react tag="span" />
    </button>
  );
}

const ICONS: Readonly<Record<EntryAction, LabIcon>> = {
  cancel: closeIcon,
  resume: runIcon,
  park: parkIcon,
  suspend: pauseIcon,
  snapshot: saveIcon,
  fork: forkIcon,
  port: launchIcon,
  stop: closeIcon
};

function actionLabel(action: EntryAction, name: string, trans: TranslationBundle): string {
  switch (action) {
    case 'cancel':
      return trans.__('Have %1 wait no longer', name);
    case 'resume':
      return trans.__('Resume %1', name);
    case 'park':
      return trans.__('Give the GPU of %1 back, and keep its variables', name);
    case 'suspend':
      return trans.__('Suspend %1', name);
    case 'snapshot':
      return trans.__('Save a snapshot of %1', name);
    case 'fork':
      return trans.__('Fork %1', name);
    case 'port':
      return trans.__('Open a web port of %1', name);
    case 'stop':
      return trans.__('Stop %1', name);
  }
}
