import { Time } from '@jupyterlab/coreutils';
import type { TranslationBundle } from '@jupyterlab/translation';
import { closeIcon, downloadIcon, editIcon, type LabIcon } from '@jupyterlab/ui-components';
import * as React from 'react';

import type { ILane, IMoment } from '../model/timeline';
import * as words from '../model/words';
import type { ISnapshotInfo } from '../forms';

/** What can be done with one of the rows. */
export interface IRowActions {
  readonly choose: (snapshot: ISnapshotInfo) => void;
  /** Begin to type another name. */
  readonly name: (snapshot: ISnapshotInfo) => void;
  /** Take the name that was typed; `key` is the one that ended that. */
  readonly rename: (snapshot: ISnapshotInfo, typed: string, key: 'Enter' | 'Escape' | null) => void;
  /** Ask whether it is really to go. */
  readonly ask: (snapshot: ISnapshotInfo) => void;
  readonly keep: (snapshot: ISnapshotInfo) => void;
  readonly remove: (snapshot: ISnapshotInfo) => void;
}

export interface IRowProps extends IRowActions {
  readonly snapshot: ISnapshotInfo;
  readonly moment: IMoment;
  readonly url: string;
  readonly isChosen: boolean;
  /** Whether its name is being typed, or it is about to be removed. */
  readonly isNaming: boolean;
  readonly isRemoving: boolean;
  readonly trans: TranslationBundle;
}

/** One snapshot: its place in time, its name, what it was and is, and what can be done with it. */
export function SnapshotRow(props: IRowProps): React.JSX.Element {
  const { snapshot, moment, url, trans } = props;
  const { id } = snapshot;
  const called = snapshot.name || id;
  if (props.isRemoving) {
    return <Question {...props} />;
  }
  return (
    <div className="wc-Snapshots-row" data-snapshot={id}>
      <Lanes lanes={moment.lanes} />
      {props.isNaming ? <NameField {...props} /> : <Label {...props} />}
      <Action
        action="rename"
        icon={editIcon}
        label={trans.__('Rename snapshot %1', called)}
        onClick={() => {
          props.name(snapshot);
        }}
      />
      <a
        className="wc-Snapshots-action"
        href={url}
        download=""
        title={trans.__(
          'Download snapshot %1. The file holds all that was in memory, passwords and keys included.',
          called
        )}
        aria-label={trans.__('Download snapshot %1', called)}
      >
        <downloadIcon.react tag="span" />
      </a>
      <Action
        action="remove"
        icon={closeIcon}
        label={trans.__('Remove snapshot %1', called)}
        onClick={() => {
          props.ask(snapshot);
        }}
      />
    </div>
  );
}

/** The kernel as it is now, which cannot be chosen. */
export function NowRow(props: {
  readonly moment: IMoment;
  readonly trans: TranslationBundle;
}): React.JSX.Element {
  const { moment, trans } = props;
  return (
    <div className="wc-Snapshots-row wc-mod-now">
      <Lanes lanes={moment.lanes} />
      <span className="wc-Snapshots-label">
        <span className="wc-Snapshots-name">{trans.__('Now')}</span>
        <span className="wc-Snapshots-facts">{origin(moment, trans)}</span>
      </span>
    </div>
  );
}

function Label({ snapshot, moment, isChosen, choose, trans }: IRowProps): React.JSX.Element {
  const made = new Date(snapshot.created_at * 1000);
  const facts = [
    snapshot.cell === null ? '' : trans.__('after cell [%1]', snapshot.cell),
    Time.formatHuman(made),
    words.bytes(snapshot.image_bytes + snapshot.layer_bytes),
    snapshot.compressed ? trans.__('compressed') : '',
    snapshot.kernel_id === null ? trans.__('imported') : origin(moment, trans)
  ];
  return (
    <label className="wc-Snapshots-label">
      <input
        type="radio"
        name="wc-snapshot"
        checked={isChosen}
        onChange={() => {
          choose(snapshot);
        }}
      />
      <span className="wc-Snapshots-what">
        <span className="wc-Snapshots-name" title={snapshot.name}>
          {snapshot.name || snapshot.id}
        </span>
        <span className="wc-Snapshots-facts" title={Time.format(made)}>
          {facts.filter(Boolean).join(' · ')}
        </span>
      </span>
    </label>
  );
}

/** What its kernel had been put back to before. */
function origin({ parent }: IMoment, trans: TranslationBundle): string {
  return parent === null ? '' : trans.__('from “%1”', parent.name || parent.id);
}

function NameField({ snapshot, rename, trans }: IRowProps): React.JSX.Element {
  return (
    <input
      className="jp-mod-styled wc-Snapshots-field"
      type="text"
      autoFocus
      defaultValue={snapshot.name}
      aria-label={trans.__('New name of snapshot %1', snapshot.name || snapshot.id)}
      onFocus={event => {
        event.target.select();
      }}
      onBlur={event => {
        rename(snapshot, event.target.value, null);
      }}
      onKeyDown={event => {
        // Of an input method: it ends a word, not the name.
        const isComposing = event.nativeEvent.isComposing;
        if (!isComposing && (event.key === 'Enter' || event.key === 'Escape')) {
          event.preventDefault();
          event.stopPropagation();
          rename(snapshot, event.currentTarget.value, event.key);
        }
      }}
    />
  );
}

/** Whether that is really to go. */
function Question({ snapshot, moment, keep, remove, trans }: IRowProps): React.JSX.Element {
  const called = snapshot.name || snapshot.id;
  return (
    <div
      className="wc-Snapshots-row"
      role="group"
      aria-label={trans.__('Remove snapshot %1', called)}
    >
      <Lanes lanes={moment.lanes} />
      <span className="wc-Snapshots-label">{trans.__('Remove “%1” for good?', called)}</span>
      <button
        type="button"
        className="jp-mod-styled jp-mod-minimal wc-Notice-button wc-Snapshots-keep"
        onClick={() => {
          keep(snapshot);
        }}
      >
        {trans.__('Keep')}
      </button>
      <button
        type="button"
        className="jp-mod-styled jp-mod-warn wc-Snapshots-sure"
        onClick={() => {
          remove(snapshot);
        }}
      >
        {trans.__('Remove')}
      </button>
    </div>
  );
}

function Action(props: {
  readonly action: string;
  readonly icon: LabIcon;
  readonly label: string;
  readonly onClick: () => void;
}): React.JSX.Element {
  const { action, icon: Icon, label, onClick } = props;
  return (
    <button
      type="button"
      className={`wc-Snapshots-action wc-mod-${action}`}
      title={label}
      aria-label={label}
      onClick={onClick}
    >
      <Icon.react tag="span" />
    </button>
  );
}

const LANE_PX = 14;
const ROW_PX = 44;

/** The lines beside a row. What they say is said in words too. */
function Lanes({ lanes }: { readonly lanes: readonly ILane[] }): React.JSX.Element {
  const x = (lane: number): number => lane * LANE_PX + LANE_PX / 2;
  const middle = ROW_PX / 2;
  const own = lanes.findIndex(({ dot }) => dot);
  return (
    <svg
      className="wc-Snapshots-lanes"
      width={lanes.length * LANE_PX}
      height={ROW_PX}
      aria-hidden="true"
    >
      {lanes.map(({ up, down, begins }, lane) => (
        <g key={lane}>
          {up && !begins && <path d={`M${x(lane)} 0V${middle}`} />}
          {up && begins && <path d={`M${x(lane)} 0Q${x(lane)} ${middle} ${x(own)} ${middle}`} />}
          {down && <path d={`M${x(lane)} ${middle}V${ROW_PX}`} />}
        </g>
      ))}
      <circle cx={x(own)} cy={middle} r={4} />
    </svg>
  );
}
