/*
 * The rows of the sandboxes panel. Pure. Every sandbox has one, whoever asked for it.
 */
import type { TranslationBundle } from '@jupyterlab/translation';

import type { ISandboxInfo, IUsage } from '../forms';
import { badges, type IBadge } from './glance';
import { isBroken, isStarting } from './situation';
import { canPark, isAlive } from './state';
import * as words from './words';

export type EntryAction =
  'cancel' | 'resume' | 'park' | 'suspend' | 'snapshot' | 'fork' | 'port' | 'stop';

/** One row. */
export interface IEntry {
  readonly sandbox: ISandboxInfo;
  readonly name: string;
  readonly tone: 'running' | 'busy' | 'starting' | 'resting' | 'failed';
  /** The state in a word or two. */
  readonly state: string;
  /** Whose it is, what it runs on, its age and how long it has been idle. */
  readonly facts: readonly string[];
  readonly badges: readonly IBadge[];
  readonly actions: readonly EntryAction[];
  /** The notebook that it is opened as, relative to the server's root; null if there is none. */
  readonly path: string | null;
  /** Whether opening it makes a notebook of a kernel that has none. */
  readonly isClone: boolean;
}

/** What is known besides the sandboxes. */
export interface ISurroundings {
  /** The open notebook of a kernel, relative to the server's root; null if it has none. */
  readonly pathOf: (kernelId: string | null) => string | null;
  /** What a sandbox uses now, if that is known. */
  readonly usageOf: (id: string) => IUsage | null;
  /** On the server's clock. */
  readonly now: number;
}

/** A row for each sandbox that exists or has failed, the youngest first. */
export function entries(
  sandboxes: readonly ISandboxInfo[],
  around: ISurroundings,
  trans: TranslationBundle
): IEntry[] {
  const byId = new Map(sandboxes.map(sandbox => [sandbox.id, sandbox]));
  return [...sandboxes]
    .sort((one, other) => other.created_at - one.created_at)
    .map(sandbox => entry(sandbox, byId, around, trans));
}

function entry(
  sandbox: ISandboxInfo,
  byId: ReadonlyMap<string, ISandboxInfo>,
  around: ISurroundings,
  trans: TranslationBundle
): IEntry {
  const own = around.pathOf(sandbox.kernel_id);
  const source = sourceOf(sandbox, byId, around);
  const isClone = sandbox.owner === 'fork' && own === null;
  const usage = around.usageOf(sandbox.id);
  return {
    sandbox,
    name: name(sandbox, own, source, trans),
    tone: tone(sandbox, usage),
    state: state(sandbox, usage, trans),
    facts: facts(sandbox, usage, around.now, trans),
    badges: badges(sandbox, trans),
    actions: actions(sandbox),
    path: own ?? (isClone && sandbox.state === 'running' ? source : null),
    isClone
  };
}

/** The open notebook of the nearest ancestor that has one. */
function sourceOf(
  sandbox: ISandboxInfo,
  byId: ReadonlyMap<string, ISandboxInfo>,
  { pathOf }: ISurroundings
): string | null {
  const seen = new Set([sandbox.id]);
  let parent = byId.get(sandbox.parent ?? '');
  while (parent !== undefined && !seen.has(parent.id)) {
    const path = pathOf(parent.kernel_id);
    if (path !== null) {
      return path;
    }
    seen.add(parent.id);
    parent = byId.get(parent.parent ?? '');
  }
  return null;
}

function name(
  sandbox: ISandboxInfo,
  own: string | null,
  source: string | null,
  trans: TranslationBundle
): string {
  const notebook = own ?? sandbox.notebook;
  if (notebook !== null) {
    return basename(notebook);
  }
  const of = source === null ? trans.__('a kernel') : basename(source);
  switch (sandbox.owner) {
    case 'fork':
      return trans.__('Clone of %1', of);
    case 'remote':
      return trans.__('Remote cell of %1', of);
    default:
      return trans.__('Sandbox %1', sandbox.id);
  }
}

/** Who asked for a sandbox; one that this page has never heard of is called as it calls itself. */
function owner(sandbox: ISandboxInfo, trans: TranslationBundle): string {
  switch (sandbox.owner) {
    case 'notebook':
      return trans.__('notebook');
    case 'fork':
      return trans.__('clone');
    case 'remote':
      return trans.__('remote cell');
    case 'client':
      return trans.__('program');
    default:
      return sandbox.owner;
  }
}

function tone(sandbox: ISandboxInfo, usage: IUsage | null): IEntry['tone'] {
  if (isBroken(sandbox)) {
    return 'failed';
  }
  if (isStarting(sandbox) && sandbox.kernel_id !== null) {
    return 'starting';
  }
  if (sandbox.state !== 'running' || sandbox.parked !== null) {
    return sandbox.state === 'creating' ? 'starting' : 'resting';
  }
  return usage?.busy === true ? 'busy' : 'running';
}

function state(sandbox: ISandboxInfo, usage: IUsage | null, trans: TranslationBundle): string {
  if (sandbox.queue !== null) {
    return trans.__('queued, place %1 of %2', sandbox.queue.place, sandbox.queue.length);
  }
  switch (tone(sandbox, usage)) {
    case 'failed':
      return sandbox.state === 'failed' ? trans.__('failed') : trans.__('kernel ended');
    case 'starting':
      return sandbox.phase === null
        ? trans.__('starting')
        : trans.__('starting: %1', words.phase(sandbox.phase, trans));
    case 'busy':
      return trans.__('busy');
    default:
      return sandbox.parked === null ? words.state(sandbox.state, trans) : trans.__('parked');
  }
}

function facts(
  sandbox: ISandboxInfo,
  usage: IUsage | null,
  now: number,
  trans: TranslationBundle
): string[] {
  const idle_s = usage?.idle_s ?? 0;
  return [
    owner(sandbox, trans),
    sandbox.state === 'suspended' || sandbox.gpus.length === 0
      ? words.choice({ gpu: sandbox.gpu }, trans)
      : words.hardware(sandbox.gpus, trans),
    trans.__('%1 old', words.age(now - sandbox.created_at, trans)),
    idle_s >= 1 && usage?.busy === false ? trans.__('idle %1', words.age(idle_s, trans)) : ''
  ].filter(Boolean);
}

function actions(sandbox: ISandboxInfo): EntryAction[] {
  if (sandbox.queue !== null) {
    return ['cancel'];
  }
  if (!isAlive(sandbox) || isBroken(sandbox)) {
    return ['stop'];
  }
  const fork: EntryAction[] = sandbox.kernel_id === null ? [] : ['fork'];
  if (sandbox.state === 'suspended') {
    return ['resume', ...fork, 'stop'];
  }
  if (sandbox.state !== 'running' || (sandbox.kernel_id !== null && isStarting(sandbox))) {
    return ['stop'];
  }
  const gpu: EntryAction[] =
    sandbox.parked !== null ? ['resume'] : canPark(sandbox) ? ['park'] : [];
  return [...gpu, 'suspend', 'snapshot', ...fork, 'port', 'stop'];
}

function basename(path: string): string {
  return path.split('/').pop() ?? path;
}
