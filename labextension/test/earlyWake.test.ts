import { deepEqual, equal } from 'node:assert/strict';
import { test } from 'node:test';

import { AWAY_MS, EarlyWake, isWriting } from '../src/model/earlyWake';
import { gpu, sandbox } from './forms';

const parked = (since: number) => sandbox({ parked: { since, vram_bytes: 0, stays_bytes: 0 } });

test('keys that write or run code are signs of a cell to come, shortcuts are not', () => {
  const key = (name: string, held = {}) =>
    isWriting({ key: name, ctrlKey: false, metaKey: false, altKey: false, ...held });
  equal(key('x'), true);
  equal(key('Backspace'), true);
  equal(key('Enter', { ctrlKey: true }), true);
  equal(key('s', { ctrlKey: true }), false);
  equal(key('s', { metaKey: true }), false);
  equal(key('Escape'), false);
  equal(key('Shift'), false);
  equal(key('@', { ctrlKey: true, altKey: true }), true, 'AltGr writes');
  equal(key('f', { altKey: true }), false);
});

function waking() {
  const asked: boolean[] = [];
  const clock = { now: 0 };
  const early = new EarlyWake(
    (_, returned) => {
      asked.push(returned);
      return Promise.reject(new Error('no GPU is free'));
    },
    () => clock.now
  );
  return { asked, clock, early };
}

test('writing asks the server once for each time that a kernel was parked', async () => {
  const { asked, early } = waking();
  early.touch(null, true);
  early.touch(sandbox(), true);
  early.touch({ ...parked(1), state: 'suspended' }, true);
  deepEqual(asked, []);
  early.touch(parked(1), true);
  early.touch(parked(1), true);
  deepEqual(asked, [false]);
  early.touch(parked(2), false);
  early.touch(parked(2), true);
  deepEqual(asked, [false, false]);
  await Promise.resolve(); // What is refused is nobody's to catch.
});

test('whoever comes back is told each time, whatever is pressed; whoever has been there is not', () => {
  const { asked, clock, early } = waking();
  early.touch(null, true);
  early.touch(parked(1), false);
  deepEqual(asked, [true], 'a page that was just opened is come back to with its first touch');
  for (let n = 0; n < 3; n++) {
    clock.now += AWAY_MS - 1;
    early.touch(parked(1), false);
  }
  deepEqual(asked, [true]);
  clock.now += AWAY_MS;
  early.touch(parked(1), true);
  early.touch(parked(1), true);
  deepEqual(asked, [true, true]);
  clock.now += AWAY_MS;
  early.touch(sandbox({ gpus: [] }), false);
  early.touch(parked(2), false);
  deepEqual(asked, [true, true], 'it was parked while somebody was there');
  clock.now += AWAY_MS;
  early.touch(sandbox({ gpus: [gpu()] }), false);
  deepEqual(asked, [true, true, true], 'what has a GPU is not to be parked now');
});
