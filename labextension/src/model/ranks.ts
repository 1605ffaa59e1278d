/*
 * What a fan-out shows: its ranks, what each has printed and displayed, and when each worked. Pure.
 */
import type { TranslationBundle } from '@jupyterlab/translation';
import type { ReadonlyPartialJSONObject } from '@lumino/coreutils';

import { isFields, list, number, text } from '../wire';
import * as words from './words';

/** As the kernel publishes it; see `sandbox/guest/magics/groups.py`. */
export const RANKS_TYPE = 'application/vnd.warmcell.ranks.v1+json';

export type RankState = 'waits' | 'runs' | 'done' | 'failed' | 'stopped';

/** What a rank has printed, or displayed. */
export type Part =
  | { readonly kind: 'text'; readonly name: 'stdout' | 'stderr'; readonly text: string }
  | {
      readonly kind: 'data';
      readonly data: ReadonlyPartialJSONObject;
      readonly metadata: ReadonlyPartialJSONObject;
    };

/** When a rank worked on something, as part of the whole time, and how that ended. */
export interface ISpan {
  readonly from_pct: number;
  readonly width_pct: number;
  readonly state: RankState;
}

export interface IRank {
  readonly rank: number;
  readonly state: RankState;
  readonly device: string;
  /** What it works on; empty where there is one task for each rank. */
  readonly label: string;
  readonly seconds: number;
  readonly tasks: number;
  /** 0: nobody knows. */
  readonly memory_bytes: number;
  /** Of its GPUs. 0: nobody knows, or none. */
  readonly vram_bytes: number;
  readonly error: string;
  readonly spans: readonly ISpan[];
  readonly parts: readonly Part[];
  /** Earlier output is no longer kept. */
  readonly isCut: boolean;
}

export interface IRanks {
  readonly state: RankState;
  readonly seconds: number;
  /** Of all ranks together. */
  readonly worked_s: number;
  readonly gpus_each: number;
  readonly sent_bytes: number;
  readonly ranks: readonly IRank[];
}

const STATES: readonly RankState[] = ['waits', 'runs', 'done', 'failed', 'stopped'];

/** Of more ranks only those that have failed are unfolded by themselves. */
const OPEN_MAX = 8;

/** What a notebook has under {@link RANKS_TYPE}, which may come from anywhere. */
export function readRanks(value: unknown): IRanks {
  const told = isFields(value) ? value : {};
  const seconds = number(told.seconds);
  return {
    state: state(told.state),
    seconds,
    worked_s: number(told.worked_s),
    gpus_each: number(told.gpus_each),
    sent_bytes: number(told.sent_bytes),
    ranks: list(told.ranks)
      .filter(isFields)
      .map((one, index) => ({
        rank: number(one.rank, index),
        state: state(one.state),
        device: text(one.device),
        label: text(one.label),
        seconds: number(one.seconds),
        tasks: number(one.tasks),
        memory_bytes: number(one.memory_bytes),
        vram_bytes: number(one.vram_bytes),
        error: text(one.error),
        spans: list(one.spans).map(span => readSpan(span, seconds)),
        parts: list(one.parts).map(readPart),
        isCut: one.cut === true
      }))
  };
}

function state(value: unknown): RankState {
  return STATES.find(known => known === value) ?? 'waits';
}

function readSpan(value: unknown, whole: number): ISpan {
  const [from, to, how] = list(value);
  const begin = share(number(from), whole);
  return {
    from_pct: begin,
    width_pct: Math.max(0, share(number(to), whole) - begin),
    state: state(how)
  };
}

function share(seconds: number, whole: number): number {
  return whole > 0 ? Math.min(100, Math.max(0, (100 * seconds) / whole)) : 0;
}

function readPart(value: unknown): Part {
  const part = isFields(value) ? value : {};
  if (isFields(part.data)) {
    return { kind: 'data', data: json(part.data), metadata: json(part.metadata) };
  }
  return {
    kind: 'text',
    name: part.name === 'stderr' ? 'stderr' : 'stdout',
    text: text(part.text)
  };
}

/** It comes from JSON, so all in it is. */
function json(value: unknown): ReadonlyPartialJSONObject {
  return isFields(value) ? (value as ReadonlyPartialJSONObject) : {};
}

/** All of it in a line: "4 ranks: 3 done, 1 failed · 12 s · 38 GPU-seconds · 1.2 MiB sent". */
export function summary(all: IRanks, trans: TranslationBundle): string {
  const { ranks, gpus_each } = all;
  const counts = [...STATES]
    .reverse()
    .map(one => ({ one, n: ranks.filter(rank => rank.state === one).length }))
    .filter(({ n }) => n > 0)
    .map(({ one, n }) => `${n} ${stateName(one, trans)}`);
  const worked =
    gpus_each > 0
      ? trans.__('%1 GPU-seconds', rounded(all.worked_s * gpus_each))
      : trans.__('%1 s of all ranks', rounded(all.worked_s));
  return [
    `${trans._n('%1 rank', '%1 ranks', ranks.length)}: ${counts.join(', ')}`,
    duration(all.seconds, trans),
    worked,
    all.sent_bytes > 0 ? trans.__('%1 sent', words.bytes(all.sent_bytes)) : ''
  ]
    .filter(Boolean)
    .join(' · ');
}

export function stateName(which: RankState, trans: TranslationBundle): string {
  switch (which) {
    case 'waits':
      return trans.__('waiting');
    case 'runs':
      return trans.__('running');
    case 'done':
      return trans.__('done');
    case 'failed':
      return trans.__('failed');
    case 'stopped':
      return trans.__('stopped');
  }
}

/** A time that is measured: "0.4 s", "12 s", "3 min 5 s", "2 h 10 min". */
export function duration(seconds: number, trans: TranslationBundle): string {
  if (seconds < 60) {
    return trans.__('%1 s', rounded(seconds));
  }
  const minutes = Math.floor(seconds / 60);
  return minutes < 60
    ? trans.__('%1 min %2 s', minutes, Math.floor(seconds % 60))
    : trans.__('%1 h %2 min', Math.floor(minutes / 60), minutes % 60);
}

function rounded(amount: number): string {
  return amount < 10 ? amount.toFixed(1) : amount.toFixed(0);
}

/** When a rank worked, for who cannot see its bars. */
export function worked(rank: IRank, all: IRanks, trans: TranslationBundle): string {
  return trans.__('Worked %1 of %2', duration(rank.seconds, trans), duration(all.seconds, trans));
}

/** Whether a rank is unfolded as long as nobody has said otherwise. */
export function isOpen(rank: IRank, all: IRanks): boolean {
  const says = rank.parts.length > 0 || rank.error !== '';
  return says && (all.ranks.length <= OPEN_MAX || rank.state === 'failed');
}

/** The last line of what a rank has printed, to be shown while it is folded. */
export function lastLine(rank: IRank): string {
  if (rank.error !== '') {
    return rank.error;
  }
  const texts = rank.parts.flatMap(part => (part.kind === 'text' ? [part.text] : []));
  const lines = (texts.at(-1) ?? '').split(/[\r\n]/).filter(line => line.trim() !== '');
  // eslint-disable-next-line no-control-regex -- Colours of terminals begin with that character.
  return (lines.at(-1) ?? '').replace(/\x1b\[[0-9;?]*[A-Za-z]/g, '').slice(0, 200);
}
