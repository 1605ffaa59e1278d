/*
 * What a notebook shows about its sandbox, decided from what is known. Pure.
 */
import type { TranslationBundle } from '@jupyterlab/translation';

import type { IErrorInfo, ISandboxInfo, ITemplateStatus } from '../tokens';
import { isAlive } from './state';
import * as words from './words';

/** A start that takes longer than this is explained. */
export const SLOW_START_S = 2;

/** An import in the background that takes longer than this is explained. */
export const SLOW_IMPORT_S = 5;

/** What is known about one notebook and its kernel. */
export interface ISituation {
  /** The kernelspec in use or about to be used; null for none. */
  readonly kernelName: string | null;
  /** Whether that is one of Warmcell's. */
  readonly ours: boolean;
  /** Whether a kernel is there (it may be dead). */
  readonly hasKernel: boolean;
  /** JupyterLab's word for what the kernel does: "idle", "restarting", "dead" and so on. */
  readonly status: string;
  readonly sandbox: ISandboxInfo | null;
  /** Whether the event stream is open; null while it is not yet known. */
  readonly connected: boolean | null;
  readonly trouble: IErrorInfo | null;
  /** Now and the moment since when the kernel has been starting, on the server's clock. */
  readonly now: number;
  readonly startingSince: number;
}

export interface IBadge {
  readonly id: 'simulated' | 'unsafe' | 'open' | 'unlimited';
  readonly tone: 'error' | 'warning' | 'note';
  readonly label: string;
  readonly title: string;
}

/** What the toolbar shows. */
export interface IGlance {
  readonly kind:
    'hidden' | 'local' | 'starting' | 'running' | 'resting' | 'failed' | 'unknown' | 'unreachable';
  readonly label: string;
  /** Whole sentences for a tooltip and for screen readers. */
  readonly title: string;
  readonly badges: readonly IBadge[];
}

/** An explanation below the toolbar. */
export interface INotice {
  /** The same for the same matter, so that a dismissed notice stays away. */
  readonly key: string;
  readonly tone: 'error' | 'warning' | 'info';
  readonly text: string;
  /** Seconds that the matter has lasted; null if it does not run. */
  readonly elapsed_s: number | null;
  readonly cure: string;
  readonly actions: readonly ('retry' | 'choose')[];
}

/** The error code of a kernel that ended by itself. */
const DIED = 'sandbox_died';

const STARTING: ReadonlySet<string> = new Set([
  'initializing',
  'starting',
  'connecting',
  'restarting',
  'autorestarting'
]);

const HIDDEN: IGlance = { kind: 'hidden', label: '', title: '', badges: [] };

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
  if (isStartingStatus(status) || !hasKernel || situation.connected !== true) {
    return waiting(situation, trans);
  }
  return {
    ...HIDDEN,
    kind: 'unknown',
    label: trans.__('sandbox gone'),
    title: trans.__('Warmcell knows no sandbox of this kernel any more. Restart the kernel.')
  };
}

/** What is to be explained in this situation, the most urgent first. */
export function notices(situation: ISituation, trans: TranslationBundle): INotice[] {
  const { ours, sandbox, now } = situation;
  if (!ours) {
    return [];
  }
  if (sandbox === null) {
    return situation.connected === false && situation.trouble !== null
      ? [unreachable(situation.trouble, trans)]
      : [];
  }
  const about = `${sandbox.id}/${sandbox.generation}`;
  if (isStarting(sandbox)) {
    return slowStart(situation, sandbox, trans);
  }
  if (isBroken(sandbox)) {
    const error = known(sandbox.error, trans);
    return [
      {
        key: `${about}/failed`,
        tone: 'error',
        text: words.sentence(error.message),
        elapsed_s: null,
        cure: words.sentence(error.hint),
        actions: ['retry', 'choose']
      }
    ];
  }
  const found: INotice[] = [];
  const died = sandbox.previous_error;
  if (died !== null) {
    found.push({
      key: `${sandbox.id}/died/${died.message}`,
      tone: 'warning',
      text: trans.__('The kernel before this one ended: %1', words.sentence(died.message)),
      elapsed_s: null,
      cure: words.sentence(died.hint),
      actions: ['choose']
    });
  }
  if (sandbox.template !== null) {
    found.push(...templateNotices(sandbox.template, now, trans));
  }
  if (sandbox.workspace_note !== '') {
    found.push({
      key: `${sandbox.id}/workspace`,
      tone: 'warning',
      text: words.sentence(sandbox.workspace_note),
      elapsed_s: null,
      cure: '',
      actions: []
    });
  }
  return found;
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
    const why = [...new Set(loose.map(([, { why }]) => words.sentence(why)))].join(' ');
    found.push({
      id: 'unlimited',
      tone: 'warning',
      label: trans.__('limits off'),
      title: trans
        .__(
          'Not enforced on this machine: %1. %2',
          loose.map(([name, status]) => words.limit(name, status, trans)).join(', '),
          why
        )
        .trim()
    });
  }
  return found;
}

/** Whether JupyterLab's word for a kernel's state means that it is on its way. */
export function isStartingStatus(status: string): boolean {
  return STARTING.has(status);
}

/** Whether what is shown changes with every second. */
export function isTicking({ ours, sandbox, status, connected }: ISituation): boolean {
  if (!ours) {
    return false;
  }
  return sandbox === null
    ? STARTING.has(status) && connected !== false
    : isStarting(sandbox) || (isAlive(sandbox) && sandbox.template?.state === 'importing');
}

/** Whether a sandbox has no kernel and is not about to get one: it failed, or the kernel in it ended by itself. */
function isBroken(sandbox: ISandboxInfo): boolean {
  return sandbox.state === 'failed' || (sandbox.state === 'running' && sandbox.error !== null);
}

function isStarting(sandbox: ISandboxInfo): boolean {
  return (
    sandbox.state === 'creating' ||
    sandbox.state === 'resuming' ||
    (sandbox.state === 'running' && sandbox.phase !== null)
  );
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

function startWord(situation: ISituation, sandbox: ISandboxInfo, trans: TranslationBundle): string {
  if (sandbox.state === 'resuming') {
    return trans.__('resuming');
  }
  return situation.status === 'restarting' || situation.status === 'autorestarting'
    ? trans.__('restarting')
    : trans.__('starting');
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
  if (sandbox.state !== 'running') {
    const label = `${what} · ${words.state(sandbox.state, trans)}`;
    return { kind: 'resting', label, title: label, badges: marks };
  }
  const how = words.started(sandbox, trans);
  return {
    kind: 'running',
    label: [what, how].filter(Boolean).join(' · '),
    title: [
      trans.__('This kernel runs in a sandbox on %1.', what),
      how ? trans.__('Started from: %1.', how) : '',
      ...marks.map(mark => mark.title)
    ]
      .filter(Boolean)
      .join(' '),
    badges: marks
  };
}

function slowStart(
  situation: ISituation,
  sandbox: ISandboxInfo,
  trans: TranslationBundle
): INotice[] {
  const since = sandbox.phase?.since ?? situation.startingSince;
  const elapsed_s = situation.now - since;
  if (elapsed_s < SLOW_START_S) {
    return [];
  }
  const what = sandbox.phase === null ? '' : words.phase(sandbox.phase, trans);
  const verb = startWord(situation, sandbox, trans);
  const subject =
    verb === trans.__('restarting')
      ? trans.__('The kernel is restarting')
      : trans.__('The kernel is starting');
  return [
    {
      key: `${sandbox.id}/${sandbox.generation}/slow/${sandbox.phase?.name ?? ''}`,
      tone: 'info',
      text: what ? `${subject}: ${what}` : subject,
      elapsed_s,
      cure: words.sentence(sandbox.phase?.hint ?? ''),
      actions: []
    }
  ];
}

/** What is to be said about a template while its kernel already runs. */
function templateNotices(
  template: ITemplateStatus,
  now: number,
  trans: TranslationBundle
): INotice[] {
  const found: INotice[] = [];
  if (template.state === 'importing' && now - template.since >= SLOW_IMPORT_S) {
    found.push({
      key: `template/${template.name}/importing/${template.importing}/${template.since}`,
      tone: 'info',
      text: trans.__('Template %1 is importing %2', template.name, template.importing),
      elapsed_s: now - template.since,
      cure: trans.__(
        'Restarts are cold starts until then. If few notebooks need %1, remove it from the template’s preload list.',
        template.importing
      ),
      actions: []
    });
  }
  if (template.state === 'failed') {
    found.push({
      key: `template/${template.name}/crashed`,
      tone: 'warning',
      text: trans.__('Template %1 crashed while importing %2.', template.name, template.importing),
      elapsed_s: null,
      cure: trans.__(
        'Kernels start without it. Remove the module from the preload list, or mend it and restart.'
      ),
      actions: []
    });
  }
  const left = Object.entries(template.failed);
  if (left.length > 0) {
    found.push({
      key: `template/${template.name}/failed/${left.map(([name]) => name).join()}`,
      tone: 'warning',
      text: trans.__(
        'Template %1 could not import %2',
        template.name,
        left.map(([name, why]) => `${name} (${why})`).join(', ')
      ),
      elapsed_s: null,
      cure: trans.__('It was left out. Mend it, or remove it from the preload list.'),
      actions: []
    });
  }
  return found;
}

function unreachable(error: IErrorInfo, trans: TranslationBundle): INotice {
  const told = words.trouble(error, trans);
  return {
    key: `unreachable/${told.code}`,
    tone: 'error',
    text: trans.__('Warmcell cannot be reached: %1', words.sentence(told.message)),
    elapsed_s: null,
    cure: words.sentence(told.hint),
    actions: []
  };
}

function known(error: IErrorInfo | null, trans: TranslationBundle): IErrorInfo {
  return (
    error ?? {
      code: 'error',
      message: trans.__('The sandbox of this kernel failed.'),
      hint: trans.__('Try again; `warmcell doctor` in a terminal says what this machine lacks.')
    }
  );
}

function both(error: IErrorInfo): string {
  return [words.sentence(error.message), words.sentence(error.hint)].filter(Boolean).join(' ');
}
