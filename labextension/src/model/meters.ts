/*
 * What meters show. Pure.
 */
import type { TranslationBundle } from '@jupyterlab/translation';

import type { IMeters, IUsage } from '../forms';
import * as words from './words';

const GIB = 2 ** 30;

/** One quantity over time. */
export interface IMetric {
  readonly id: 'gpu' | 'vram' | 'cpu' | 'ram';
  readonly label: string;
  readonly value: string;
  /** The oldest first, each from 0 to 1. */
  readonly points: readonly number[];
}

/**
 * What one sandbox uses, GPU first; empty before the first reading. What is not known has no metric.
 *
 * @param history - The oldest reading first.
 * @param hasGpu - Whether it has one now. The last reading may be older than that.
 */
export function metrics(
  history: readonly IUsage[],
  trans: TranslationBundle,
  hasGpu = true
): IMetric[] {
  const last = history.at(-1);
  if (last === undefined) {
    return [];
  }
  const found: IMetric[] = [];
  if (hasGpu && last.gpu_pct !== null) {
    found.push({
      id: 'gpu',
      label: trans.__('GPU'),
      value: percent(last.gpu_pct),
      points: history.map(({ gpu_pct }) => share(gpu_pct, 100))
    });
  }
  if (hasGpu && last.vram_bytes !== null) {
    found.push({
      id: 'vram',
      label: trans.__('VRAM'),
      value: words.bytes(last.vram_bytes),
      points: history.map(({ vram_bytes, vram_total_bytes }) => share(vram_bytes, vram_total_bytes))
    });
  }
  // One processor fills the line, unless more were in use.
  const most = Math.max(1, ...history.map(({ cpu }) => cpu ?? 0));
  found.push({
    id: 'cpu',
    label: trans.__('CPU'),
    // Not known of what has just begun, or come back: it takes two readings.
    value: last.cpu === null ? '–' : percent(100 * last.cpu),
    points: history.map(({ cpu }) => share(cpu, most))
  });
  // Without a limit a GiB does, unless more was in use: of a whole machine's memory a kernel's would be a flat line.
  const largest = Math.max(GIB, ...history.map(({ memory_bytes }) => memory_bytes));
  found.push({
    id: 'ram',
    label: trans.__('RAM'),
    value: words.bytes(last.memory_bytes),
    points: history.map(({ memory_bytes, memory_limit_bytes }) =>
      share(memory_bytes, memory_limit_bytes ?? largest)
    )
  });
  return found;
}

/** What the machine uses, in short. */
export function machineShort({ machine }: IMeters, trans: TranslationBundle): string[] {
  const { cpus, cpu, memory_bytes, memory_total_bytes, gpus } = machine;
  const busy = gpus.flatMap(({ utilization_pct }) => utilization_pct ?? []);
  const simulated = gpus.length > 0 && gpus.every(gpu => gpu.simulated);
  return [
    cpu === null ? '' : trans.__('CPU %1', percent((100 * cpu) / cpus)),
    trans.__('RAM %1 of %2', words.bytes(memory_bytes), words.bytes(memory_total_bytes)),
    busy.length === 0
      ? ''
      : trans.__('GPU %1', percent(busy.reduce((sum, one) => sum + one, 0) / busy.length)),
    simulated ? trans._n('%1 simulated GPU', '%1 simulated GPUs', gpus.length) : ''
  ].filter(Boolean);
}

/** The same with each GPU by itself, a line each. */
export function machineWhole(meters: IMeters, trans: TranslationBundle): string[] {
  const { gpus } = meters.machine;
  return [
    trans.__('This machine: %1', machineShort(meters, trans).join(', ')),
    ...gpus.map(gpu => {
      const { index, name, simulated, utilization_pct, memory_used_bytes, memory_total_bytes } =
        gpu;
      const used = [
        simulated ? trans.__('simulated') : '',
        utilization_pct === null ? '' : percent(utilization_pct),
        memory_used_bytes === null
          ? words.bytes(memory_total_bytes)
          : trans.__('%1 of %2', words.bytes(memory_used_bytes), words.bytes(memory_total_bytes))
      ];
      return trans.__('GPU %1, %2: %3', index, name, used.filter(Boolean).join(', '));
    })
  ];
}

function share(part: number | null, whole: number | null): number {
  return part === null || whole === null || whole <= 0 ? 0 : Math.min(1, part / whole);
}

function percent(amount: number): string {
  return `${Math.round(amount)} %`;
}
