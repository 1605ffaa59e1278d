import assert from 'node:assert/strict';
import { test } from 'node:test';

import { waterfall } from '../src/model/waterfall';
import { trans } from './forms';

test('parts follow each other in their order, whatever order they are told in', () => {
  const bars = waterfall({ ready: 20, restore: 50, create: 25, lease: 5 }, trans);
  assert.deepEqual(
    bars.map(({ phase, from_pct, width_pct }) => [phase, from_pct, width_pct]),
    [
      ['lease', 0, 5],
      ['create', 5, 25],
      ['restore', 30, 50],
      ['ready', 80, 20]
    ]
  );
});

test('parts that took no time are left out, but that a sandbox was waiting is said', () => {
  assert.deepEqual(
    waterfall({ queue: 0, pool: 0, start: 8 }, trans).map(({ label }) => label),
    ['prepared in advance', 'start']
  );
});

test('a part that this page does not know comes before the first answer, under its own name', () => {
  assert.deepEqual(
    waterfall({ ready: 1, teleport: 1, create: 1 }, trans).map(({ label }) => label),
    ['create', 'teleport', 'ready']
  );
});

test('nothing is shown of nothing', () => {
  assert.deepEqual(waterfall({}, trans), []);
});
