/*
 * What a start, restore or resume spent its time on, as bars one after the other. Pure.
 */
import type { TranslationBundle } from '@jupyterlab/translation';

/** One part of a start. */
export interface IBar {
  readonly phase: string;
  readonly label: string;
  readonly ms: number;
  /** Where it begins and how long it is, of the whole. */
  readonly from_pct: number;
  readonly width_pct: number;
}

/** In the order in which they follow each other; what is not among them comes before the last. */
const ORDER = ['queue', 'lease', 'pool', 'create', 'start', 'restore', 'unpark', 'ready'];

/** The parts of a start in their order; empty if nothing is known of it. Parts that took no time are left out. */
export function waterfall(
  phases_ms: Readonly<Record<string, number>>,
  trans: TranslationBundle
): IBar[] {
  const rank = (phase: string): number => {
    const found = ORDER.indexOf(phase);
    return found < 0 ? ORDER.length - 1.5 : found;
  };
  const phases = Object.entries(phases_ms)
    .filter(([phase, ms]) => ms > 0 || phase === 'pool')
    .sort(([one], [other]) => rank(one) - rank(other));
  const whole = phases.reduce((sum, [, ms]) => sum + ms, 0);
  let before = 0;
  return phases.map(([phase, ms]) => {
    const from_pct = whole === 0 ? 0 : (100 * before) / whole;
    before += ms;
    return {
      phase,
      label: phaseLabel(phase, trans),
      ms,
      from_pct,
      width_pct: whole === 0 ? 0 : (100 * ms) / whole
    };
  });
}

function phaseLabel(phase: string, trans: TranslationBundle): string {
  switch (phase) {
    case 'queue':
      return trans.__('queue');
    case 'lease':
      return trans.__('lease');
    case 'pool':
      return trans.__('prepared in advance');
    case 'create':
      return trans.__('create');
    case 'start':
      return trans.__('start');
    case 'restore':
      return trans.__('restore');
    case 'unpark':
      return trans.__('unpark');
    case 'ready':
      return trans.__('ready');
    default:
      return phase;
  }
}
