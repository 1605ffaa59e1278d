/*
 * What the toolbar shows about a notebook's sandbox. Pure.
 */
import type { TranslationBundle } from '@jupyterlab/translation';

import type { IErrorInfo, IQueued, ISandboxInfo } from '../forms';
import {
  DIED,
  isBroken,
  isStarting,
  isStartingStatus,
  type ISituation,
  known,
  startWord
} from './situation';
import * as words from './words';

export interface IBadge {
  readonly id: 'simulated' | 'unsafe' | 'open' | 'unlimited';
  readonly tone: 'error' | 'warning' | 'note';
  readonly label: string;
  readonly title: string;
}

/** What the toolbar shows. */
export interface IGlance {
  readonly kind:
    | 'hidden'
    | 'local'
    | 'starting'
    | 'running'
    | 'woken'
    | 'suspended'
    | 'resting'
    | 'failed'
    | 'unknown'
    | 'unreachable';
  readonly label: string;
  /** Whole sentences for a tooltip and for screen readers. */
  readonly title: string;
  readonly badges: readonly IBadge[];
}

/** Nothing is known, or there is nothing to be shown. */
export const HIDDEN: IGlance = { kind: 'hidden', label: '', title: '', badges: [] };

/** What the toolbar shows in this situation. */
export function glance(situation: ISituation, trans: TranslationBundle): IGlance {
  const { kernelName, ours, sandbox, status, hasKernel } = situation;
  if (kernelName === null) {
    return HIDDEN;
  }
  if (!ours) {
    return {
      ...HIDDEN,
      kind: 'local',
      label: trans.__('no sandbox'),
      title: trans.__(
        'This kernel runs directly on the Jupyter server, outside Warmcell. Choose another kernel to change that.'
      )
    };
  }
  if (sandbox?.queue) {
    return queued(situation, sandbox, sandbox.queue, trans);
  }
  if (sandbox !== null && isStarting(sandbox)) {
    return starting(situation, sandbox, trans);
  }
  if (sandbox !== null && isBroken(sandbox)) {
    return failed(sandbox, trans);
  }
  if (sandbox !== null) {
    return present(sandbox, trans);
  }
  if (situation.connected === false && situation.trouble !== null) {
    const error = words.trouble(situation.trouble, trans);
    return {
      ...HIDDEN,
      kind: 'unreachable',
      label: trans.__('Warmcell cannot be reached'),
      title: both(error)
    };
  }
  if (isStartingStatus(status) || !hasKernel) {
    return waiting(situation, trans);
  }
  if (situation.connected !== true) {
    return { ...HIDDEN, kind: 'resting', label: '…', title: trans.__('Asking about this kernel.') };
  }
  return {
    ...HIDDEN,
    kind: 'unknown',
    label: trans.__('sandbox gone'),
    title: trans.__('Warmcell knows no sandbox of this kernel any more. Restart the kernel.')
  };
}

/** The marks of a sandbox that is not as one would expect. */
export function badges(sandbox: ISandboxInfo, trans: TranslationBundle): IBadge[] {
  const found: IBadge[] = [];
  if (!sandbox.isolated) {
    found.push({
      id: 'unsafe',
      tone: 'error',
      label: trans.__('unsafe'),
      title: trans.__(
        'Not isolated: the %1 backend runs this kernel with all your files and rights.',
        sandbox.backend
      )
    });
  }
  if (sandbox.gpus.some(gpu => gpu.simulated)) {
    found.push({
      id: 'simulated',
      tone: 'note',
      label: trans.__('simulated'),
      title: trans.__('This GPU is simulated by the configuration. Nothing computes on it.')
    });
  }
  if (sandbox.isolated && sandbox.network === 'host') {
    found.push({
      id: 'open',
      tone: 'warning',
      label: trans.__('open'),
      title: trans.__('Network open: this kernel reaches the machine’s own network.')
    });
  }
  const loose = Object.entries(sandbox.limits).filter(
    ([, { value, enforced }]) => value !== null && !enforced
  );
  if (loose.length > 0) {
    found.push({
      id: 'unlimited',
      tone: 'warning',
      label: trans.__('limits off'),
      title: words.sentence(
        trans.__('Not enforced on this machine: %1', words.reasoned(loose, trans).join('; '))
      )
    });
  }
  return found;
}

function queued(
  situation: ISituation,
  sandbox: ISandboxInfo,
  { request, place, length, since }: IQueued,
  trans: TranslationBundle
): IGlance {
  const time = words.seconds(situation.now - since);
  return {
    kind: 'starting',
    label: trans.__('%1 · queue %2/%3 · %4', request, place, length, time),
    title: trans.__('Waiting for a GPU (%1): place %2 of %3.', request, place, length),
    badges: badges(sandbox, trans)
  };
}

function starting(situation: ISituation, sandbox: ISandboxInfo, trans: TranslationBundle): IGlance {
  const since = sandbox.phase?.since ?? situation.startingSince;
  const time = words.seconds(situation.now - since);
  const what = sandbox.phase === null ? '' : words.phase(sandbox.phase, trans);
  const label = what
    ? `${startWord(situation, sandbox, trans)}: ${what}… ${time}`
    : `${startWord(situation, sandbox, trans)}… ${time}`;
  return {
    kind: 'starting',
    label,
    title: [label, sandbox.phase?.hint ?? ''].filter(Boolean).join('. '),
    badges: badges(sandbox, trans)
  };
}

function waiting(situation: ISituation, trans: TranslationBundle): IGlance {
  const label = `${trans.__('starting')}… ${words.seconds(situation.now - situation.startingSince)}`;
  return { ...HIDDEN, kind: 'starting', label, title: label };
}

function failed(sandbox: ISandboxInfo, trans: TranslationBundle): IGlance {
  return {
    ...HIDDEN,
    kind: 'failed',
    label: sandbox.error?.code === DIED ? trans.__('kernel ended') : trans.__('start failed'),
    title: both(known(sandbox.error, trans))
  };
}

function present(sandbox: ISandboxInfo, trans: TranslationBundle): IGlance {
  const what = words.hardware(sandbox.gpus, trans);
  const marks = badges(sandbox, trans);
  if (sandbox.state === 'suspended') {
    return {
      kind: 'suspended',
      label: `${words.choice({ gpu: sandbox.gpu }, trans)} · ${words.state(sandbox.state, trans)}`,
      title: trans.__(
        'Suspended: its memory is on disk and it holds no GPU. It goes on with the next cell, with all its variables.'
      ),
      badges: marks
    };
  }
  if (sandbox.parked !== null) {
    return {
      kind: 'suspended',
      label: `${words.choice({ gpu: sandbox.gpu }, trans)} · ${trans.__('parked')}`,
      title: trans.__(
        'Parked: its GPU is free for others, and what it had there waits in the memory of the machine. It goes on with the next cell, with all its variables.'
      ),
      badges: marks
    };
  }
  if (sandbox.state !== 'running') {
    const label = `${what} · ${words.state(sandbox.state, trans)}`;
    return { kind: 'resting', label, title: label, badges: marks };
  }
  const how = words.started(sandbox, trans);
  const woke = words.wokeFrom(sandbox);
  return {
    kind: woke !== null ? 'woken' : 'running',
    label: [what, how].filter(Boolean).join(' · '),
    title: [
      sandbox.isolated
        ? trans.__('This kernel runs in a sandbox on %1.', what)
        : trans.__('This kernel runs on %1.', what),
      woke === null ? how && trans.__('Started from: %1.', how) : wakeUp(sandbox, woke, trans),
      words.notSaved(sandbox, trans),
      ...marks.map(mark => mark.title)
    ]
      .filter(Boolean)
      .join(' '),
    badges: marks
  };
}

function wakeUp(
  { resumed_ms }: ISandboxInfo,
  from: 'disk' | 'park',
  trans: TranslationBundle
): string {
  const took = words.milliseconds(resumed_ms ?? 0);
  return from === 'park'
    ? trans.__('It was parked, and went on with a GPU and all its variables within %1.', took)
    : trans.__('It was suspended, and went on from disk with all its variables within %1.', took);
}

function both(error: IErrorInfo): string {
  return [words.sentence(error.message), words.sentence(error.hint)].filter(Boolean).join(' ');
}
