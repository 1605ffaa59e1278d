import { Notification, showErrorMessage } from '@jupyterlab/apputils';

import * as words from '../model/words';

/** Work that takes longer than this says that it goes on. */
const SLOW_MS = 700;

const SAID_MS = 5000;

/** JupyterLab cuts what a notification says after so many characters. */
const NOTIFIED = 140;

/** Await work; while it takes long, a notification says so. */
export async function slowly<T>(pending: string, work: Promise<T>): Promise<T> {
  let shown = '';
  const timer = window.setTimeout(() => {
    shown = Notification.emit(pending, 'in-progress', { autoClose: false });
  }, SLOW_MS);
  try {
    return await work;
  } finally {
    window.clearTimeout(timer);
    if (shown !== '') {
      Notification.dismiss(shown);
    }
  }
}

/** Await work; if it fails, say why. */
export async function orSayWhy(who: string, work: () => Promise<void>): Promise<void> {
  try {
    await work();
  } catch (reason) {
    sayWhy(who, reason);
  }
}

/** Say why something failed, until that is dismissed: what is too long for a notification in a dialog, with the cure. */
export function sayWhy(who: string, reason: unknown): void {
  const { message, hint } = words.asError(reason);
  const why = [words.sentence(message), words.sentence(hint)].join(' ').trim();
  const said = `${who}: ${why}`;
  if (said.length > NOTIFIED) {
    void showErrorMessage(who, why);
  } else {
    Notification.error(said, { autoClose: false });
  }
}

/** Say that something is done, for a moment. */
export function sayDone(what: string): void {
  Notification.success(what, { autoClose: SAID_MS });
}
