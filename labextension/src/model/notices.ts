/*
 * What is explained below a notebook's toolbar: slow starts, failures and their cures. Pure.
 */
import type { TranslationBundle } from '@jupyterlab/translation';

import type { IErrorInfo, IParked, IQueued, ISandboxInfo, ITemplateStatus } from '../forms';
import { isServed, missing } from './choice';
import { isAsleep } from './state';
import { DIED, isBroken, isStarting, type ISituation, known, startWord } from './situation';
import * as words from './words';

/** A start that takes longer than this is explained. */
export const SLOW_START_S = 2;

/** An import in the background that takes longer than this is explained. */
export const SLOW_IMPORT_S = 5;

export type NoticeAction = 'retry' | 'choose' | 'apply' | 'resume' | 'restart' | 'cancel' | 'wake';

/** An explanation below the toolbar. */
export interface INotice {
  /** The same for the same matter, so that a dismissed notice stays away. */
  readonly key: string;
  readonly tone: 'error' | 'warning' | 'info';
  readonly text: string;
  /** Seconds that the matter has lasted; null if it does not run. */
  readonly elapsed_s: number | null;
  readonly cure: string;
  readonly actions: readonly NoticeAction[];
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
  if (sandbox.queue !== null) {
    return [queued(sandbox, sandbox.queue, situation, trans)];
  }
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
  if (sandbox.state === 'suspended' && sandbox.error !== null) {
    const { message, hint } = sandbox.error;
    return [
      {
        key: `${about}/asleep/${message}`,
        tone: 'error',
        text: trans.__('The kernel cannot go on where it was: %1', words.sentence(message)),
        elapsed_s: null,
        cure: [
          words.sentence(hint),
          trans.__('It stays on disk until you restart it without its variables.')
        ]
          .join(' ')
          .trim(),
        actions: ['resume', 'restart']
      }
    ];
  }
  if (sandbox.state === 'suspended') {
    return [asleep(sandbox, trans)];
  }
  if (sandbox.parked !== null) {
    return [parked(sandbox, sandbox.parked, trans)];
  }
  const found = unserved(situation, sandbox, trans);
  const died = sandbox.previous_error;
  if (died?.code === DIED) {
    found.push({
      key: `${sandbox.id}/died/${died.message}`,
      tone: 'warning',
      text: words.sentence(died.message),
      elapsed_s: null,
      cure: [trans.__('Another was started, without its variables.'), words.sentence(died.hint)]
        .join(' ')
        .trim(),
      actions: ['choose']
    });
  }
  if (sandbox.not_saved.length > 0) {
    found.push({
      key: `${sandbox.id}/not-saved/${sandbox.snapshot ?? ''}`,
      tone: 'warning',
      text: trans.__('Not come back with this kernel: %1.', sandbox.not_saved.join(', ')),
      elapsed_s: null,
      cure: trans.__('They ran beside it when it was saved. Start again what you need.'),
      actions: []
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

/**
 * That a kernel was started with less than its notebook asks for.
 *
 * A notebook may come from anybody, so what it asks for beyond what the server grants by itself takes a click. After a
 * restart the user has decided.
 */
function unserved(
  { choice }: ISituation,
  sandbox: ISandboxInfo,
  trans: TranslationBundle
): INotice[] {
  if (sandbox.generation !== 1 || isServed(choice, sandbox)) {
    return [];
  }
  const asked = words.choice(missing(choice, sandbox), trans);
  return [
    {
      key: `${sandbox.id}/unserved`,
      tone: 'info',
      text: trans.__('This notebook asks for %1.', asked),
      elapsed_s: null,
      cure: trans.__('Its kernel was started without. A restart with it loses variables.'),
      actions: ['apply', 'choose']
    }
  ];
}

/** That a kernel is suspended, and how it goes on. */
function asleep(sandbox: ISandboxInfo, trans: TranslationBundle): INotice {
  return {
    key: `${sandbox.id}/suspended/${sandbox.snapshot ?? ''}`,
    tone: 'info',
    text: trans.__('This kernel is suspended.'),
    elapsed_s: null,
    cure: [
      sandbox.gpu === null
        ? trans.__('Its variables are on disk. It goes on with the next cell.')
        : trans.__(
            'Its variables are on disk, and its GPU (%1) is free for others. It goes on with the next cell.',
            words.choice({ gpu: sandbox.gpu }, trans)
          ),
      words.notSaved(sandbox, trans)
    ]
      .filter(Boolean)
      .join(' '),
    actions: ['wake']
  };
}

/** That a kernel's GPU is given back, and how it goes on. */
function parked(
  sandbox: ISandboxInfo,
  { since, vram_bytes, stays_bytes }: IParked,
  trans: TranslationBundle
): INotice {
  return {
    key: `${sandbox.id}/parked/${since}`,
    tone: 'info',
    text: trans.__('This kernel is parked.'),
    elapsed_s: null,
    cure:
      stays_bytes === 0
        ? trans.__(
            'Its variables are there, %1 of GPU memory included, and its GPU (%2) is free for others. It goes on with the next cell.',
            words.bytes(vram_bytes),
            words.choice({ gpu: sandbox.gpu }, trans)
          )
        : trans.__(
            'Its variables are there, %1 of GPU memory included, and its GPU (%2) is free for others, but for %3 that stay there. It goes on with the next cell.',
            words.bytes(vram_bytes),
            words.choice({ gpu: sandbox.gpu }, trans),
            words.bytes(stays_bytes)
          ),
    actions: ['wake']
  };
}

/** That a start, or a wake-up, waits for a GPU. */
function queued(
  sandbox: ISandboxInfo,
  { request, place, length, since, estimate_s, why }: IQueued,
  { now, nameOf }: ISituation,
  trans: TranslationBundle
): INotice {
  const named = (text: string): string =>
    text.replace(/\bsandbox ([a-z0-9]{12})\b/g, (whole, id: string) => nameOf(id) ?? whole);
  return {
    key: `${sandbox.id}/${sandbox.generation}/queued`,
    tone: 'info',
    text: trans.__('Waiting for a GPU (%1): place %2 of %3 in the queue', request, place, length),
    elapsed_s: now - since,
    cure: [
      words.sentence(named(why)),
      estimate_s === null ? '' : trans.__('About %1 to go.', words.age(estimate_s, trans)),
      isAsleep(sandbox) ? trans.__('The cell goes on as soon as there is one.') : ''
    ]
      .filter(Boolean)
      .join(' '),
    actions: isAsleep(sandbox) ? ['cancel'] : ['cancel', 'choose']
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
      text: template.importing
        ? trans.__('Template %1 is importing %2', template.name, template.importing)
        : trans.__('Template %1 is being prepared', template.name),
      elapsed_s: now - template.since,
      cure: template.importing
        ? trans.__(
            'Restarts are cold starts until then. If few notebooks need %1, remove it from the preload list of the kernelspec.',
            template.importing
          )
        : trans.__('Restarts are cold starts until then.'),
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
