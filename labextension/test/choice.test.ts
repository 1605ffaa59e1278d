import assert from 'node:assert/strict';
import { test } from 'node:test';

import {
  gpuKinds,
  gpuRequest,
  type IGpuKind,
  isOtherGpu,
  isServed,
  parseHosts,
  parseMemory,
  readChoice,
  shortage,
  shownRequest,
  splitRequest,
  waitingFor,
  writeChoice
} from '../src/model/choice';
import type { IChoice } from '../src/forms';
import { device, GIB, gpu, lease, sandbox, template } from './forms';

test('a choice survives the notebook', () => {
  const choices: IChoice[] = [
    {},
    { gpu: null },
    { gpu: 'A100:2', memory_bytes: 8 * GIB, network: 'host', template: 'vision' },
    { gpu: ['H100', 'A100'], memory_bytes: 1536 * 2 ** 20 },
    { network: ['pypi.org', '*.example.com'] }
  ];
  for (const choice of choices) {
    assert.deepEqual(readChoice(JSON.parse(JSON.stringify(writeChoice(choice)))), choice);
  }
});

test('hosts are typed in any way', () => {
  assert.deepEqual(parseHosts(' pypi.org, *.a.b;c\nc '), ['pypi.org', '*.a.b', 'c']);
  assert.deepEqual(parseHosts(' , '), []);
});

test('metadata is written as somebody would write it by hand', () => {
  assert.deepEqual(writeChoice({ gpu: 'A100:2', memory_bytes: 8 * GIB, network: 'none' }), {
    gpu: 'A100:2',
    memory: '8GiB',
    network: 'none'
  });
});

test('what metadata says in no known way is left out', () => {
  for (const metadata of [
    undefined,
    null,
    'A100',
    [],
    { gpu: 7, memory: 'much', network: 'lan', template: '' },
    { network: [] },
    { network: ['pypi.org', 7] }
  ]) {
    assert.deepEqual(readChoice(metadata), {});
  }
});

test('amounts of memory are read in the usual spellings', () => {
  assert.equal(parseMemory('8GiB'), 8 * GIB);
  assert.equal(parseMemory(' 1.5 g '), 1.5 * GIB);
  assert.equal(parseMemory('512mb'), 512 * 2 ** 20);
  assert.equal(parseMemory('4096'), 4096);
  for (const text of ['', '0GiB', '-1GiB', 'GiB', '1 2', 'NaN']) {
    assert.equal(parseMemory(text), null, text);
  }
});

test('a request is a kind and a count, there and back', () => {
  for (const [request, kind, count, parts] of [
    ['A100-SXM4-80GB:2', 'A100-SXM4-80GB', 2, 1],
    ['any', 'any', 1, 1],
    ['A100/4', 'A100', 1, 4]
  ] as const) {
    assert.deepEqual(splitRequest(request), { kind, count, parts });
    assert.equal(gpuRequest({ kind, count, parts }), request);
  }
});

test('GPUs are grouped by kind with how many are free, the largest first', () => {
  const kinds = gpuKinds([
    gpu({ uuid: '1', name: 'NVIDIA L4', memory_total_bytes: 24 * GIB }),
    gpu({ uuid: '2', name: 'NVIDIA A100-SXM4-80GB', lease: lease() }),
    gpu({ uuid: '3', name: 'NVIDIA A100-SXM4-80GB' })
  ]);
  assert.deepEqual(
    kinds.map(({ request, free, devices }) => [request, free, devices.length]),
    [
      ['A100-SXM4-80GB', 1, 2],
      ['L4', 1, 1]
    ]
  );
});

test('simulated and real devices of one name are two kinds', () => {
  assert.equal(gpuKinds([gpu(), gpu({ uuid: '2', simulated: true })]).length, 2);
});

test('a picker shows what is held, else what was asked for, else CPU', () => {
  const kinds = gpuKinds([gpu()]);
  const two = { kind: 'A100-SXM4-80GB', count: 2, parts: 1 };
  assert.deepEqual(shownRequest('any:2', [device(), device()], kinds), two);
  assert.deepEqual(shownRequest('a100-sxm4-80gb:2', [], kinds), two);
  const half = { kind: 'A100-SXM4-80GB', count: 1, parts: 2 };
  assert.deepEqual(shownRequest('any/2', [device({ parts: 2 })], kinds), half);
  assert.deepEqual(shownRequest('a100-sxm4-80gb/2', [], kinds), half);
  assert.deepEqual(shownRequest('H100', [], kinds), { kind: 'H100', count: 1, parts: 1 });
  const either = { kind: 'H100, L4', count: 1, parts: 1 };
  assert.deepEqual(shownRequest(['H100', 'L4'], [], kinds), either);
  assert.equal(shownRequest(null, [], kinds), null);
  assert.equal(shownRequest(undefined, [], kinds), null);
});

test('a sandbox serves a choice if everything that was chosen is as it has it', () => {
  const has = sandbox({
    gpu: 'A100:2',
    gpus: [device(), device()],
    limits: { memory: { value: 8 * GIB, enforced: true, why: '' } },
    template: template()
  });
  assert.ok(isServed({}, has));
  assert.ok(
    isServed({ gpu: 'a100:2', memory_bytes: 8 * GIB, network: 'none', template: 'default' }, has)
  );
  assert.ok(!isServed({ gpu: 'A100' }, has));
  assert.ok(!isServed({ gpu: null }, has));
  assert.ok(!isServed({ memory_bytes: 4 * GIB }, has));
  assert.ok(!isServed({ network: 'host' }, has));
  assert.ok(!isServed({ network: ['pypi.org'] }, has));
  const reaches = sandbox({ network: ['a.example', 'pypi.org'] });
  assert.ok(isServed({ network: ['pypi.org', 'a.example'] }, reaches));
  assert.ok(!isServed({ network: 'none' }, reaches));
  assert.ok(!isServed({ template: 'vision' }, has));
});

test('a kernel that lives only needs another GPU if nothing else was chosen anew', () => {
  const has = sandbox({ gpu: 'A100', gpus: [device()], template: template() });
  assert.ok(isOtherGpu({ gpu: 'T4', network: 'none', template: 'default' }, has));
  assert.ok(isOtherGpu({ gpu: 'A100/2' }, has));
  assert.ok(isOtherGpu({ gpu: null }, has));
  assert.ok(!isOtherGpu({ gpu: 'a100' }, has));
  const whole = { ...has, gpus: [device()] };
  assert.ok(!isOtherGpu({ gpu: 'A100-SXM4-80GB' }, whole), 'the picker names what it has in full');
  assert.ok(isOtherGpu({ gpu: 'A100-SXM4-80GB:2' }, whole));
  assert.ok(isOtherGpu({ gpu: 'A100-SXM4-80GB/2' }, whole));
  assert.ok(!isOtherGpu({ gpu: 'T4', network: 'host' }, has));
  assert.ok(!isOtherGpu({ network: 'host' }, has));
});

test('a share is free where others have shares of that size, and not all', () => {
  const kinds = (parts: number, ...holders: string[]): IGpuKind[] => {
    const leases = holders.map(sandbox_id => lease({ sandbox_id, parts }));
    return gpuKinds([gpu({ lease: leases[0] ?? null, leases })]);
  };
  assert.equal(shortage('A100-SXM4-80GB/2', kinds(2, 'theirs'), null), null);
  assert.equal(shortage('A100-SXM4-80GB/2', kinds(2, 'theirs', 'mine'), 'mine'), null);
  assert.equal(shortage('A100-SXM4-80GB/2', kinds(2, 'theirs', 'others'), null)?.available, 0);
  assert.equal(shortage('A100-SXM4-80GB/4', kinds(2, 'theirs'), null)?.available, 0);
  assert.equal(shortage('A100-SXM4-80GB', kinds(2, 'theirs'), null)?.available, 0);
});

test('a shortage is told before a restart would give up what is held', () => {
  const kinds = gpuKinds([
    gpu({ uuid: '1', lease: lease({ sandbox_id: 'mine' }) }),
    gpu({ uuid: '2', lease: lease({ sandbox_id: 'theirs' }) }),
    gpu({ uuid: '3' })
  ]);
  const found = { name: 'A100-SXM4-80GB', asked: 3, available: 2 };
  assert.deepEqual(shortage('A100-SXM4-80GB:3', kinds, 'mine'), found);
  assert.equal(shortage('A100-SXM4-80GB:2', kinds, 'mine'), null);
  assert.equal(shortage('A100-SXM4-80GB:2', kinds, null)?.available, 1);
  assert.equal(shortage('any:9', kinds, null), null);
  assert.equal(shortage(null, kinds, null), null);
});

test('who waits is counted with every kind that would serve', () => {
  const [kind] = gpuKinds([gpu()]);
  assert.ok(kind);
  const waiting = (request: string): number =>
    waitingFor(kind, [{ sandbox_id: 'a', request, place: 1 }]);
  for (const request of ['A100', 'a100-80gb:2', 'any', '24GiB', '80GiB', 'H100,A100', 'A100/2']) {
    assert.equal(waiting(request), 1, request);
  }
  for (const request of ['H100', '96GiB', 'A100-40GB']) {
    assert.equal(waiting(request), 0, request);
  }
});
