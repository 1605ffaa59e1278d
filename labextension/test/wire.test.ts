import assert from 'node:assert/strict';
import { test } from 'node:test';

import { readEvent, readSandbox, WireError } from '../src/wire';

test('a sandbox is read with all that it says', () => {
  const read = readSandbox({
    id: 'a1',
    state: 'running',
    isolated: true,
    kernel_id: 'k1',
    gpu: ['H100', 'A100'],
    gpus: [{ uuid: 'u', index: 1, name: 'A100', memory_total_bytes: 5, simulated: true }],
    limits: { memory: { value: 7, enforced: false, why: 'no cgroup' } },
    phase: { name: 'template', since: 12.5, detail: 'torch', hint: 'wait' },
    started_from: 'snapshot',
    started_ms: 84.5,
    resumed_ms: 52.5,
    not_saved: ['sleep 9', 7],
    error: { code: 'sandbox_died', message: 'gone', hint: 'restart', details: { exit_code: 1 } }
  });
  assert.equal(read.kernel_id, 'k1');
  assert.deepEqual(read.gpu, ['H100', 'A100']);
  assert.equal(read.gpus[0]?.simulated, true);
  assert.deepEqual(read.limits.memory, { value: 7, enforced: false, why: 'no cgroup' });
  assert.deepEqual(read.phase, { name: 'template', since: 12.5, detail: 'torch', hint: 'wait' });
  assert.equal(read.started_ms, 84.5);
  assert.deepEqual([read.started_from, read.resumed_ms], ['snapshot', 52.5]);
  assert.equal(read.not_saved[0], 'sleep 9');
  assert.equal(read.error?.hint, 'restart');
});

test('what is left out or unknown never reads as safer than it is', () => {
  const read = readSandbox({ id: 'a1', state: 'melted', network: 'wormhole' });
  assert.equal(read.isolated, false);
  assert.equal(read.network, 'host');
  const reaches = { allow: ['pypi.org'], headers: { 'api.example': { A: '***' } } };
  const named = readSandbox({ id: 'a1', network: 'none', egress: reaches });
  assert.deepEqual(named.network, ['pypi.org', 'api.example']);
  assert.equal(read.state, 'failed');
});

test('a sandbox without an id is refused', () => {
  assert.throws(() => readSandbox({ state: 'running' }), WireError);
});

test('events are read by kind, unknown kinds are skipped, malformed ones refused', () => {
  const hello = readEvent(
    'hello',
    '{"sandboxes": [{"id": "a"}], "templates": [{"name": "default"}]}'
  );
  assert.equal(hello?.kind, 'hello');
  assert.equal(hello.sandboxes[0]?.id, 'a');
  assert.equal(hello.templates[0]?.status.state, 'none');
  assert.equal(readEvent('weather', '{}'), null);
  assert.throws(() => readEvent('sandbox', '{"id"'), SyntaxError);
  assert.throws(() => readEvent('sandbox', '[]'), WireError);
});
