import assert from 'node:assert/strict';
import { test } from 'node:test';

import { type ICopyContents, removeCopy, saveCopy } from '../src/model/copies';

/** A folder of files in memory; what is asked of it is answered when the test says so. */
function folder(...names: string[]): {
  contents: ICopyContents;
  saved: string[];
  answer: (() => void)[];
  isFull: boolean;
  names: string[];
} {
  const saved: string[] = [];
  const answer: (() => void)[] = [];
  const contents = {
    localPath: (path: string) => path,
    driveName: () => '',
    get: () => {
      const content = names.map(name => ({ name }));
      return new Promise(resolve => {
        answer.push(() => {
          resolve({ content });
        });
      });
    },
    save: (path: string) => {
      if (made.isFull) {
        return Promise.reject(new Error('no room'));
      }
      saved.push(path);
      names.push(path.split('/').pop() ?? '');
      return Promise.resolve({});
    },
    delete: () => Promise.reject(new Error('gone already'))
  };
  const made = {
    contents: contents as unknown as ICopyContents,
    saved,
    answer,
    isFull: false,
    names
  };
  return made;
}

test('two that look for a free name at once find different ones', async () => {
  const { contents, saved, answer } = folder('a.ipynb');
  const both = [saveCopy(contents, 'one/a.ipynb', {}), saveCopy(contents, 'one/a.ipynb', {})];
  answer[1]?.();
  await both[1];
  answer[0]?.(); // With a list of before the other was saved.
  assert.deepEqual(await Promise.all(both), ['one/a-Fork2.ipynb', 'one/a-Fork1.ipynb']);
  assert.equal(saved.length, 2);
});

test('one that is never answered is in nobody’s way', async () => {
  const { contents, answer } = folder('a.ipynb');
  void saveCopy(contents, 'two/a.ipynb', {});
  const second = saveCopy(contents, 'two/a.ipynb', {});
  answer[1]?.();
  assert.equal(await second, 'two/a-Fork1.ipynb');
});

test('a name is free again where nothing came of its copy', async () => {
  const disk = folder('a.ipynb');
  const copy = (): Promise<string> => {
    const made = saveCopy(disk.contents, 'three/a.ipynb', {});
    disk.answer.pop()?.();
    return made;
  };
  disk.isFull = true;
  await assert.rejects(copy(), /no room/);
  disk.isFull = false;
  const path = await copy();
  assert.equal(path, 'three/a-Fork1.ipynb');
  disk.names.splice(disk.names.indexOf('a-Fork1.ipynb'), 1);
  await removeCopy(disk.contents, path);
  assert.equal(await copy(), path);
});
