import assert from 'node:assert/strict';
import { test } from 'node:test';

import * as words from '../src/model/words';
import { device, GIB, sandbox, trans } from './forms';

test('amounts of memory have one short form', () => {
  assert.equal(words.bytes(80 * GIB), '80 GiB');
  assert.equal(words.bytes(1.5 * GIB), '1.5 GiB');
  assert.equal(words.bytes(512 * 2 ** 20), '512 MiB');
  assert.equal(words.bytes(900), '900 B');
});

test('a measured time is in milliseconds below a second', () => {
  assert.equal(words.milliseconds(84.2), '84 ms');
  assert.equal(words.milliseconds(999.4), '999 ms');
  assert.equal(words.milliseconds(999.9), '1 s');
  assert.equal(words.milliseconds(1240), '1.2 s');
  assert.equal(words.milliseconds(12_345), '12 s');
});

test('a running time counts whole seconds and is never negative', () => {
  assert.equal(words.seconds(12.9), '12 s');
  assert.equal(words.seconds(-3), '0 s');
  assert.equal(words.seconds(185), '3 min 5 s');
});

test('hardware is CPU, or its devices counted by short name', () => {
  assert.equal(words.hardware([], trans), 'CPU');
  assert.equal(words.hardware([device({ name: 'NVIDIA A100-SXM4-80GB' })], trans), 'A100-80GB');
  assert.equal(words.hardware([device({ name: 'Tesla T4', parts: 2 })], trans), '1/2 Tesla T4');
  const mixed = [
    device({ name: 'NVIDIA L4' }),
    device({ name: 'Tesla T4' }),
    device({ name: 'NVIDIA L4' })
  ];
  assert.equal(words.hardware(mixed, trans), '2 × L4, Tesla T4');
});

test('how a kernel was started names the rung and the time', () => {
  const clone = sandbox({ started_from: 'snapshot', owner: 'fork' });
  assert.equal(words.started(clone, trans), 'fork · 84 ms');
  assert.equal(words.started(sandbox(), trans), 'template · 84 ms');
  assert.equal(
    words.started(sandbox({ started_from: 'cold', started_ms: 912 }), trans),
    'cold start · 912 ms'
  );
  assert.equal(words.started(sandbox({ started_from: null, started_ms: null }), trans), '');
});

test('limits are in their own units', () => {
  const status = { value: 8 * GIB, enforced: true, why: '' };
  assert.equal(words.limit('memory', status, trans), 'memory 8 GiB');
  assert.equal(words.limit('pids', { ...status, value: 4096 }, trans), 'processes 4096');
  assert.equal(words.limit('cpu', { ...status, value: 1.5 }, trans), 'CPU cores 1.5');
});

test('a sentence ends with one stop', () => {
  assert.equal(words.sentence('bwrap is missing'), 'bwrap is missing.');
  assert.equal(words.sentence('Install it. '), 'Install it.');
  assert.equal(words.sentence(''), '');
});

test('a server without the extension is told with its cure', () => {
  const told = words.trouble({ code: 'absent', message: '404 Not Found', hint: '' }, trans);
  assert.match(told.message, /does not run the Warmcell server extension/);
  assert.match(told.hint, /jupyter server extension enable warmcell/);
});

test('a shortage is told in numbers, none as none', () => {
  const found = { name: 'A100', asked: 3, available: 2 };
  assert.equal(words.shortage(found, trans).message, 'Only 2 × A100 can be had now, not 3');
  assert.equal(words.shortage({ ...found, available: 0 }, trans).message, 'No A100 is free now');
});
