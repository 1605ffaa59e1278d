import assert from 'node:assert/strict';
import { test } from 'node:test';

import { glance } from '../src/model/glance';
import { notices } from '../src/model/notices';
import { isTicking } from '../src/model/situation';
import { GIB, device, sandbox, situation, template, trans } from './forms';

const ERROR = {
  code: 'backend_unavailable',
  message: 'bwrap was not found',
  hint: 'Install bubblewrap'
};

test('a running kernel shows its hardware, how it was started and how fast', () => {
  assert.equal(glance(situation(), trans).label, 'CPU · template · 84 ms');
  const two = sandbox({ gpus: [device(), device({ uuid: 'GPU-2' })] });
  assert.equal(
    glance(situation({ sandbox: two }), trans).label,
    '2 × A100-80GB · template · 84 ms'
  );
});

test('a kernel that is not ours says so, no kernel shows nothing', () => {
  assert.equal(glance(situation({ ours: false, sandbox: null }), trans).kind, 'local');
  assert.equal(glance(situation({ kernelName: null, ours: false }), trans).kind, 'hidden');
});

test('a start shows its phase and counts its seconds', () => {
  const starting = situation({
    status: 'initializing',
    sandbox: sandbox({
      state: 'creating',
      phase: { name: 'template', since: 1988, detail: 'torch', hint: '' }
    })
  });
  assert.equal(glance(starting, trans).label, 'starting: template torch… 12 s');
  assert.ok(isTicking(starting));
});

test('a restart in the same sandbox is called a restart', () => {
  const restarting = situation({
    status: 'restarting',
    sandbox: sandbox({
      generation: 2,
      phase: { name: 'kernel', since: 1999, detail: '', hint: '' }
    })
  });
  assert.equal(glance(restarting, trans).label, 'restarting: kernel… 1 s');
});

test('before the server has told of a sandbox the start counts all the same', () => {
  const waiting = situation({ status: 'initializing', hasKernel: false, sandbox: null });
  assert.equal(glance(waiting, trans).label, 'starting… 10 s');
  assert.ok(isTicking(waiting));
});

test('a start that failed is never shown as starting, and has message, cure and a way on', () => {
  for (const status of ['starting', 'restarting', 'initializing', 'unknown', 'dead']) {
    const failed = situation({
      status,
      sandbox: sandbox({ state: 'failed', phase: null, error: ERROR })
    });
    const shown = glance(failed, trans);
    assert.equal(shown.kind, 'failed');
    assert.equal(shown.title, 'bwrap was not found. Install bubblewrap.');
    assert.ok(!isTicking(failed));
    const [notice] = notices(failed, trans);
    assert.equal(notice?.tone, 'error');
    assert.equal(notice.text, 'bwrap was not found.');
    assert.equal(notice.cure, 'Install bubblewrap.');
    assert.deepEqual(notice.actions, ['retry', 'choose']);
  }
});

test('a failure without an error still names what to do', () => {
  const [notice] = notices(situation({ sandbox: sandbox({ state: 'failed' }) }), trans);
  assert.match(notice?.cure ?? '', /warmcell doctor/);
});

test('a kernel that ended in a living sandbox is told as ended', () => {
  const ended = situation({
    status: 'dead',
    sandbox: sandbox({ error: { ...ERROR, code: 'sandbox_died' } })
  });
  assert.equal(glance(ended, trans).label, 'kernel ended');
  assert.equal(notices(ended, trans)[0]?.tone, 'error');
});

test('after an automatic restart the page still says why the kernel before ended', () => {
  const error = {
    code: 'sandbox_died',
    message: 'The kernel was killed for memory',
    hint: 'Give more'
  };
  const again = situation({ sandbox: sandbox({ generation: 2, previous_error: error }) });
  assert.equal(glance(again, trans).kind, 'running');
  const [notice] = notices(again, trans);
  assert.equal(notice?.tone, 'warning');
  assert.match(notice.text, /killed for memory/);
  assert.equal(notice.cure, 'Another was started, without its variables. Give more.');
});

test('a short start is not explained, a long one is, with phase, seconds and cure', () => {
  const starting = (now: number): ReturnType<typeof notices> =>
    notices(
      situation({
        now,
        status: 'initializing',
        sandbox: sandbox({
          state: 'creating',
          phase: { name: 'template', since: 1000, detail: 'slowmod', hint: 'Remove slowmod' }
        })
      }),
      trans
    );
  assert.deepEqual(starting(1001), []);
  const [notice] = starting(1012);
  assert.equal(notice?.text, 'The kernel is starting: template slowmod');
  assert.equal(notice.elapsed_s, 12);
  assert.equal(notice.cure, 'Remove slowmod.');
});

test('a slow import behind a running kernel is explained with its cure', () => {
  const importing = situation({
    now: 1012,
    sandbox: sandbox({
      template: template({ state: 'importing', importing: 'slowmod', since: 1000 })
    })
  });
  const [notice] = notices(importing, trans);
  assert.equal(notice?.text, 'Template default is importing slowmod');
  assert.equal(notice.elapsed_s, 12);
  assert.match(notice.cure, /remove it from the preload list/);
  assert.ok(isTicking(importing));
});

test('modules that a template could not import are named', () => {
  const left = situation({
    sandbox: sandbox({ template: template({ failed: { broken: 'SyntaxError: invalid' } }) })
  });
  assert.match(notices(left, trans)[0]?.text ?? '', /broken \(SyntaxError: invalid\)/);
});

test('everything that is less than expected is marked', () => {
  const marked = (change: Parameters<typeof sandbox>[0]): string[] =>
    glance(situation({ sandbox: sandbox(change) }), trans).badges.map(({ id }) => id);
  assert.deepEqual(marked({}), []);
  assert.deepEqual(marked({ isolated: false, backend: 'process', network: 'host' }), ['unsafe']);
  assert.deepEqual(marked({ network: 'host' }), ['open']);
  assert.deepEqual(marked({ gpus: [device({ simulated: true })] }), ['simulated']);
  const why = 'no writable cgroup';
  assert.deepEqual(marked({ limits: { memory: { value: 8, enforced: false, why } } }), [
    'unlimited'
  ]);
  assert.deepEqual(marked({ limits: { memory: { value: null, enforced: false, why } } }), []);
  assert.deepEqual(marked({ limits: { memory: { value: 8, enforced: true, why: '' } } }), []);
});

test('a mark says its reason once', () => {
  const why = 'no writable cgroup';
  const loose = sandbox({
    limits: {
      memory: { value: 2 ** 30, enforced: false, why },
      pids: { value: 9, enforced: false, why }
    }
  });
  assert.equal(
    glance(situation({ sandbox: loose }), trans).badges[0]?.title,
    'Not enforced on this machine: memory 1 GiB, processes 9 (no writable cgroup).'
  );
});

test('a server that cannot be reached is said with its cure', () => {
  const cut = situation({
    sandbox: null,
    connected: false,
    trouble: { code: 'absent', message: '404 Not Found', hint: '' }
  });
  assert.equal(glance(cut, trans).kind, 'unreachable');
  assert.match(notices(cut, trans)[0]?.cure ?? '', /jupyter server extension enable warmcell/);
});

test('while the stream is cut, what was known is still shown', () => {
  const cut = situation({
    connected: false,
    trouble: { code: 'unreachable', message: 'x', hint: '' }
  });
  assert.equal(glance(cut, trans).kind, 'running');
  assert.deepEqual(notices(cut, trans), []);
});

test('a kernel whose sandbox nobody knows is said to be gone', () => {
  assert.equal(glance(situation({ sandbox: null }), trans).kind, 'unknown');
});

test('a kernel that was first started with less than its notebook asks for is said, once restarted no more', () => {
  const asked = (generation: number): ReturnType<typeof notices> =>
    notices(
      situation({
        sandbox: sandbox({ generation }),
        choice: { gpu: 'A100:2', network: 'host', template: 'default' }
      }),
      trans
    );
  const [notice] = asked(1);
  assert.equal(notice?.text, 'This notebook asks for 2 × A100, an open network.');
  assert.deepEqual(notice.actions, ['apply', 'choose']);
  assert.deepEqual(asked(2), []);
});

test('hosts that a notebook asks for are named, the first few of them', () => {
  const asked = (network: readonly string[]): string | undefined =>
    notices(situation({ sandbox: sandbox({ generation: 1 }), choice: { network } }), trans)[0]
      ?.text;
  assert.equal(asked(['pypi.org']), 'This notebook asks for a way to pypi.org.');
  assert.equal(
    asked(['a.b', 'c.d', 'e.f', 'g.h']),
    'This notebook asks for a way to a.b, c.d and 2 more.'
  );
});

test('until the server has answered, a kernel that runs is neither starting nor gone', () => {
  const asking = situation({ sandbox: null, connected: null });
  assert.equal(glance(asking, trans).kind, 'resting');
  assert.ok(!isTicking(asking));
});

test('an old error is no failure while the next kernel is being started', () => {
  const again = situation({
    status: 'autorestarting',
    sandbox: sandbox({
      generation: 2,
      error: ERROR,
      phase: { name: 'kernel', since: 1999, detail: '', hint: '' }
    })
  });
  assert.equal(glance(again, trans).kind, 'starting');
  assert.deepEqual(notices(again, trans), []);
});

test('a suspended kernel says what it would run on and what wakes it, and asks for nothing', () => {
  const suspended = situation({ sandbox: sandbox({ state: 'suspended', gpu: 'A100:2' }) });
  const shown = glance(suspended, trans);
  assert.equal(shown.label, '2 × A100 · suspended');
  assert.equal(shown.kind, 'suspended');
  assert.match(shown.title, /goes on with the next cell/);
  const [notice] = notices(suspended, trans);
  assert.match(notice?.cure ?? '', /2 × A100/);
  assert.deepEqual([notice?.tone, notice?.actions], ['info', ['wake']]);
  assert.ok(!isTicking(suspended));
});

test('a parked kernel says what is where and what wakes it; while it waits for a GPU so does its cell', () => {
  const parked = { since: 1, vram_bytes: 3 * GIB, stays_bytes: 0 };
  const asleep = situation({ sandbox: sandbox({ gpu: 'A100', parked }) });
  const shown = glance(asleep, trans);
  assert.deepEqual([shown.kind, shown.label], ['suspended', 'A100 · parked']);
  const [notice] = notices(asleep, trans);
  assert.match(notice?.cure ?? '', /3.* GiB of GPU memory included, and its GPU \(A100\) is free/);
  assert.deepEqual(notice?.actions, ['wake']);
  const half = situation({ sandbox: sandbox({ gpu: 'T4/2', parked }) });
  assert.equal(glance(half, trans).label, '1/2 T4 · parked');
  const left = sandbox({ gpu: 'A100', parked: { ...parked, stays_bytes: GIB / 2 } });
  const [partly] = notices(situation({ sandbox: left }), trans);
  assert.match(partly?.cure ?? '', /free for others, but for 512 MiB that stay there/);
  const queue = { request: 'any', place: 1, length: 1, since: 2000, estimate_s: null, why: '' };
  const [waits] = notices(situation({ sandbox: sandbox({ parked, queue }) }), trans);
  assert.match(waits?.cure ?? '', /The cell goes on/);
  assert.deepEqual(waits?.actions, ['cancel']);
});

test('a kernel that went on shows how fast', () => {
  const resumed = sandbox({ started_from: 'snapshot', resumed_ms: 52.4 });
  assert.equal(glance(situation({ sandbox: resumed }), trans).label, 'CPU · resumed · 52 ms');
  const unparked = glance(
    situation({
      sandbox: sandbox({ resumed_ms: 900, phases_ms: { queue: 2, unpark: 890, ready: 8 } })
    }),
    trans
  );
  assert.deepEqual([unparked.label, unparked.kind], ['CPU · unparked · 900 ms', 'woken']);
  assert.match(unparked.title, /It was parked, and went on with a GPU .* within 900 ms/);
  const clone = sandbox({ started_from: 'snapshot', started_ms: 61 });
  assert.equal(glance(situation({ sandbox: clone }), trans).label, 'CPU · snapshot · 61 ms');
});

test('what ran beside a kernel and is not saved with it is said while it sleeps, and when it is back', () => {
  const not_saved = ['python -m http.server', 'sleep 9'];
  const [asleep] = notices(
    situation({ sandbox: sandbox({ state: 'suspended', not_saved }) }),
    trans
  );
  assert.match(asleep?.cure ?? '', /does not come back: python -m http.server, sleep 9\.$/);
  const back = situation({
    sandbox: sandbox({ started_from: 'snapshot', resumed_ms: 52, snapshot: 's1', not_saved })
  });
  assert.match(glance(back, trans).title, /within 52 ms\. .* does not come back: python -m http/);
  const [notice, ...others] = notices(back, trans);
  assert.deepEqual([notice?.tone, notice?.key], ['warning', 'abc123def456/not-saved/s1']);
  assert.match(notice?.text ?? '', /python -m http.server, sleep 9/);
  assert.deepEqual(others, []);
});

test('a suspended kernel that cannot go on is said, with two ways on', () => {
  const [notice] = notices(
    situation({ sandbox: sandbox({ state: 'suspended', error: ERROR }) }),
    trans
  );
  assert.equal(notice?.tone, 'error');
  assert.match(notice.text, /cannot go on where it was: bwrap was not found/);
  assert.match(notice.cure, /without its variables/);
  assert.deepEqual(notice.actions, ['resume', 'restart']);
});

test('a start in the queue says its place, counts, and can be given up', () => {
  const queue = {
    request: 'A100',
    place: 2,
    length: 3,
    since: 1940,
    estimate_s: 240,
    why: 'GPU 0 by sandbox abc123def456'
  };
  const nameOf = (): string => 'other.ipynb';
  const waits = situation({
    sandbox: sandbox({ state: 'creating', generation: 0, queue }),
    nameOf
  });
  assert.equal(glance(waits, trans).label, 'A100 · queue 2/3 · 1 min 0 s');
  const [notice, ...others] = notices(waits, trans);
  assert.equal(notice?.text, 'Waiting for a GPU (A100): place 2 of 3 in the queue');
  assert.equal(notice.cure, 'GPU 0 by other.ipynb. About 4 min to go.');
  assert.deepEqual([notice.actions, others], [['cancel', 'choose'], []]);
  assert.ok(isTicking(waits));
});

test('a suspended kernel that waits for a GPU says that its cell waits', () => {
  const queue = { request: 'any', place: 1, length: 1, since: 2000, estimate_s: null, why: '' };
  const waits = situation({ sandbox: sandbox({ state: 'suspended', queue }) });
  const [notice] = notices(waits, trans);
  assert.equal(notice?.text, 'Waiting for a GPU (any): place 1 of 1 in the queue');
  assert.match(notice.cure, /The cell goes on/);
  assert.deepEqual(notice.actions, ['cancel']);
});
