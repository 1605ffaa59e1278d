import assert from 'node:assert/strict';
import { test } from 'node:test';

import { machineShort, machineWhole, metrics } from '../src/model/meters';
import type { IMeters } from '../src/forms';
import { device, GIB, trans, usage } from './forms';

test('what a kernel uses: GPU first, and nothing of what is not known', () => {
  const all = usage({ gpu_pct: 30, vram_bytes: 2 * GIB, vram_total_bytes: 8 * GIB });
  assert.deepEqual(
    metrics([all], trans).map(({ id, value }) => [id, value]),
    [
      ['gpu', '30 %'],
      ['vram', '2 GiB'],
      ['cpu', '50 %'],
      ['ram', '1 GiB']
    ]
  );
  assert.deepEqual(
    metrics([usage()], trans).map(({ id }) => id),
    ['cpu', 'ram']
  );
  assert.deepEqual(metrics([], trans), []);
  assert.deepEqual(
    metrics([all], trans, false).map(({ id }) => id),
    ['cpu', 'ram']
  );
});

test('lines are shares: memory of its limit, else of the most in use; processors likewise', () => {
  const history = [
    usage({ cpu: null }),
    usage({ cpu: 4 }),
    usage({ cpu: 1, memory_bytes: 4 * GIB })
  ];
  const [cpu, ram] = metrics(history, trans);
  assert.deepEqual(cpu?.points, [0, 1, 0.25]);
  assert.deepEqual(ram?.points, [0.25, 0.25, 1]);
  assert.deepEqual(metrics([usage({ memory_bytes: GIB / 4 })], trans)[1]?.points, [0.25]);
  const [, limited] = metrics([usage({ memory_limit_bytes: 2 * GIB })], trans);
  assert.deepEqual(limited?.points, [0.5]);
});

test('a rate that is not known yet keeps its place', () => {
  assert.equal(metrics([usage({ cpu: null })], trans)[0]?.value, '–');
});

test('the machine in short, and each of its GPUs', () => {
  const meters: IMeters = {
    at: 0,
    sandboxes: new Map(),
    machine: {
      cpus: 4,
      cpu: 1,
      memory_bytes: 3 * GIB,
      memory_total_bytes: 24 * GIB,
      gpus: [
        { ...device({ simulated: true }), utilization_pct: null, memory_used_bytes: null },
        { ...device({ index: 1 }), utilization_pct: 60, memory_used_bytes: GIB }
      ]
    }
  };
  assert.deepEqual(machineShort(meters, trans), ['CPU 25 %', 'RAM 3 GiB of 24 GiB', 'GPU 60 %']);
  const [, first, second] = machineWhole(meters, trans);
  assert.match(first ?? '', /GPU 0, A100-SXM4-80GB: simulated, 80 GiB/);
  assert.match(second ?? '', /GPU 1, .*: 60 %, 1 GiB of 80 GiB/);
});
