import { deepEqual, equal } from 'node:assert/strict';
import { test } from 'node:test';

import { EarlyWake, isWriting } from '../src/model/earlyWake';
import { sandbox } from './forms';

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

test('the server is asked once for each time that a kernel was parked', async () => {
  const asked: string[] = [];
  const early = new EarlyWake(id => {
    asked.push(id);
    return Promise.reject(new Error('no GPU is free'));
  });
  early.sign(null);
  early.sign(sandbox());
  early.sign({ ...parked(1), state: 'suspended' });
  deepEqual(asked, []);
  early.sign(parked(1));
  early.sign(parked(1));
  equal(asked.length, 1);
  early.sign(parked(2));
  equal(asked.length, 2);
  await Promise.resolve(); // What is refused is nobody's to catch.
});
