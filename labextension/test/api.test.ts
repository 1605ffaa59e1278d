import assert from 'node:assert/strict';
import { test } from 'node:test';

import { ServerConnection } from '@jupyterlab/services';

import { Api, ApiError } from '../src/api';
import type { ServerEvent } from '../src/forms';
import { GIB } from './forms';

const BASE = 'http://localhost:1/base/';

interface IAsked {
  readonly method: string;
  readonly path: string;
  readonly body: unknown;
}

/** An API whose server answers everything in the same way, and what it was asked. */
function answering(answer: () => Response | Promise<Response>): { api: Api; asked: IAsked[] } {
  const asked: IAsked[] = [];
  const settings = ServerConnection.makeSettings({
    baseUrl: BASE,
    token: 'secret',
    fetch: async (input: RequestInfo | URL) => {
      const request = input as Request;
      const body = await request.text();
      asked.push({
        method: request.method,
        path: new URL(request.url).pathname,
        body: body === '' ? null : (JSON.parse(body) as unknown)
      });
      return answer();
    }
  });
  return { api: new Api(settings), asked };
}

const json = (body: unknown, status = 200): Response =>
  new Response(JSON.stringify(body), { status });

test('a choice goes out as the partial spec that the server reads', async () => {
  const { api, asked } = answering(() => json({}));
  await api.check({ gpu: 'A100:2', memory_bytes: 8 * GIB, network: 'none', template: 'default' });
  await api.configure('k/1', { gpu: null });
  assert.deepEqual(asked, [
    {
      method: 'POST',
      path: '/base/warmcell/api/v1/check',
      body: {
        spec: {
          gpu: 'A100:2',
          limits: { memory_bytes: 8 * GIB },
          network: 'none',
          template: 'default'
        }
      }
    },
    {
      method: 'PUT',
      path: '/base/warmcell/api/v1/kernels/k%2F1/settings',
      body: { gpu: null }
    }
  ]);
});

test('a web port is below the server, or on a host of its own with the port of the server', async () => {
  const path = '/warmcell/ports/80-abc/t/';
  const below = answering(() => json({ path, host: null, expires_at: 1 }));
  assert.equal(
    await below.api.portUrl('abc', 80),
    'http://localhost:1/base/warmcell/ports/80-abc/t/'
  );
  assert.deepEqual(below.asked, [
    { method: 'POST', path: '/base/warmcell/api/v1/sandboxes/abc/ports/80', body: {} }
  ]);
  for (const [host, shown] of [
    ['80-abc.boxes.test', 'http://80-abc.boxes.test:1/?ticket=t'],
    ['80-abc.boxes.test:443', 'http://80-abc.boxes.test:443/?ticket=t']
  ] as const) {
    const { api } = answering(() => json({ path: '/?ticket=t', host, expires_at: 1 }));
    assert.equal(await api.portUrl('abc', 80), shown);
  }
});

test('GPUs come with who holds them, and with who waits', async () => {
  const lease = { sandbox_id: 'abc', since: 5, mine: false, user: 'eve', parts: 2 };
  const waiting = { sandbox_id: 'def', request: 'L4', place: 1 };
  const device = { uuid: 'u', name: 'L4', lease, leases: [lease, lease] };
  const { api } = answering(() => json({ gpus: [device], queue: [waiting], shares: 4 }));
  const { gpus, queue, shares } = await api.gpus();
  assert.deepEqual(gpus[0]?.lease, lease);
  assert.equal(gpus[0].leases.length, 2);
  assert.deepEqual([queue, shares], [[waiting], 4]);
});

test('a server without a queue is told from one in which nobody waits', async () => {
  const { api } = answering(() => json({ gpus: [{ uuid: 'u', lease: { sandbox_id: 'a' } }] }));
  const { gpus, queue } = await api.gpus();
  assert.equal(queue, null);
  assert.equal(gpus[0]?.leases[0]?.mine, true);
});

test('meters are read by sandbox; what a device does not say is null', async () => {
  const used = { cpu: 1.5, memory_bytes: 7, busy: true, idle_s: 0, gpu_pct: null };
  const machine = {
    cpus: 2,
    cpu: null,
    memory_bytes: 3,
    memory_total_bytes: 9,
    gpus: [{ index: 1 }]
  };
  const { api } = answering(() => json({ at: 5, sandboxes: { abc: used }, machine }));
  const meters = await api.meters();
  assert.deepEqual(meters.sandboxes.get('abc'), {
    ...used,
    memory_limit_bytes: null,
    vram_bytes: null,
    vram_total_bytes: null
  });
  assert.equal(meters.machine.cpu, null);
  assert.equal(meters.machine.gpus[0]?.utilization_pct, null);
});

test('an error of the server keeps its code and its cure', async () => {
  const error = { code: 'unknown_gpu_kind', message: 'No H100', hint: 'It has A100.', details: {} };
  const { api } = answering(() => json(error, 400));
  await assert.rejects(api.check({ gpu: 'H100' }), (reason: unknown) => {
    assert.ok(reason instanceof ApiError);
    assert.equal(reason.code, 'unknown_gpu_kind');
    assert.equal(reason.message, 'No H100');
    assert.equal(reason.hint, 'It has A100.');
    return true;
  });
});

test('a server without the extension, and one that is gone, are told apart', async () => {
  const { api: absent } = answering(() => new Response('<html>', { status: 404 }));
  await assert.rejects(absent.gpus(), { code: 'absent' });
  const { api: gone } = answering(() => Promise.reject(new TypeError('Failed to fetch')));
  await assert.rejects(gone.gpus(), { code: 'unreachable' });
});

test('events arrive one by one, after the clocks have been compared', async () => {
  const ahead = new Date(Date.now() + 60_000).toUTCString();
  const { api } = answering(
    () =>
      new Response(
        'event: hello\ndata: {"sandboxes": [], "templates": [], "version": "9"}\n\n: still here\n\n' +
          'event: news\ndata: {}\n\nevent: sandbox\ndata: {"id": "a"}\n\n',
        { headers: { Date: ahead } }
      )
  );
  const told: string[] = [];
  await api.events(
    new AbortController().signal,
    ({ skew_s }) => {
      assert.ok(Math.abs(skew_s - 60) < 2, `${skew_s}`);
      told.push('opened');
    },
    (event: ServerEvent) => {
      told.push(event.kind);
    }
  );
  assert.deepEqual(told, ['opened', 'hello', 'sandbox']);
});

test('a stream that is not of the protocol is an error, not silence', async () => {
  const { api } = answering(() => new Response('event: sandbox\ndata: {}\n\n'));
  await assert.rejects(
    api.events(
      new AbortController().signal,
      () => undefined,
      () => undefined
    ),
    /no id/
  );
});

test('a sandbox is suspended and resumed by its id', async () => {
  const { api, asked } = answering(() => json({}));
  await api.suspend('abc');
  await api.resume('abc');
  assert.deepEqual(asked, [
    { method: 'POST', path: '/base/warmcell/api/v1/sandboxes/abc/suspend', body: {} },
    { method: 'POST', path: '/base/warmcell/api/v1/sandboxes/abc/resume', body: {} }
  ]);
});

test('a fork answers its clone, and one without a clone is an error', async () => {
  const { api, asked } = answering(() => json({ sandboxes: [{ id: 'b', kernel_id: 'k2' }] }, 201));
  const clone = await api.fork('a');
  assert.deepEqual([clone.id, clone.kernel_id], ['b', 'k2']);
  assert.deepEqual(asked, [
    { method: 'POST', path: '/base/warmcell/api/v1/sandboxes/a/fork', body: { n: 1 } }
  ]);
  const { api: empty } = answering(() => json({ sandboxes: [] }, 201));
  await assert.rejects(empty.fork('a'), { code: 'protocol' });
});

test('snapshots are saved by name, renamed, restored and removed by id', async () => {
  const { api, asked } = answering(() => json({ id: 's', name: 'first', memory_bytes: 7 }));
  const saved = await api.saveSnapshot('a', 'first');
  await api.renameSnapshot('s', 'best');
  await api.restoreSnapshot('a', 's');
  await api.removeSnapshot('s');
  assert.deepEqual([saved.name, saved.memory_bytes], ['first', 7]);
  assert.deepEqual(asked, [
    { method: 'POST', path: '/base/warmcell/api/v1/sandboxes/a/snapshot', body: { name: 'first' } },
    { method: 'PATCH', path: '/base/warmcell/api/v1/snapshots/s', body: { name: 'best' } },
    { method: 'POST', path: '/base/warmcell/api/v1/sandboxes/a/restore', body: { snapshot: 's' } },
    { method: 'DELETE', path: '/base/warmcell/api/v1/snapshots/s', body: null }
  ]);
});

test('an archive has an address below the base URL, and goes back as the bytes that it is', async () => {
  const { api, asked } = answering(() => json({ id: 's2', name: 'again', kernel_id: null }, 201));
  assert.equal(api.snapshotUrl('s/1'), `${BASE}warmcell/api/v1/snapshots/s%2F1/export`);
  const brought = await api.importSnapshot(new Blob(['{"bytes": 1}']));
  assert.deepEqual([brought.id, brought.kernel_id], ['s2', null]);
  assert.deepEqual(asked, [
    { method: 'POST', path: '/base/warmcell/api/v1/snapshots/import', body: { bytes: 1 } }
  ]);
});

test('a server that does not say so takes no snapshots from elsewhere', async () => {
  const { api: silent } = answering(() => json({ snapshots: [] }));
  assert.equal((await silent.snapshots()).imports, false);
  const { api: willing } = answering(() => json({ snapshots: [], imports: true }));
  assert.equal((await willing.snapshots()).imports, true);
});
