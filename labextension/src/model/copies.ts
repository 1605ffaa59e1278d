/*
 * Copies of notebooks beside them.
 */
import { PathExt } from '@jupyterlab/coreutils';
import type { Contents } from '@jupyterlab/services';

import { freeName } from './names';

/** What copying needs of the application's contents. */
export type ICopyContents = Pick<
  Contents.IManager,
  'get' | 'save' | 'delete' | 'localPath' | 'driveName'
>;

/**
 * What copies of this page were given, listed yet or not: two that look for a free name at once find different ones,
 * and none waits for another whose server does not answer.
 */
const given = new Set<string>();

/**
 * Save a copy of a notebook beside it, under a name that nothing has.
 *
 * @returns its path.
 * @throws what the contents throw; nothing is saved.
 */
export async function saveCopy(
  contents: ICopyContents,
  notebook: string,
  content: unknown
): Promise<string> {
  const local = contents.localPath(notebook);
  const drive = contents.driveName(notebook);
  const onDrive = (place: string): string => (drive === '' ? place : `${drive}:${place}`);
  const folder = PathExt.dirname(local);
  const beside = (name: string): string => onDrive(PathExt.join(folder, name));
  const listing = await contents.get(onDrive(folder), { content: true });
  const listed = new Set((listing.content as Contents.IModel[]).map(item => item.name));
  const isTaken = (name: string): boolean => listed.has(name) || given.has(beside(name));
  const path = beside(freeName(PathExt.basename(local), isTaken));
  given.add(path);
  try {
    await contents.save(path, { type: 'notebook', format: 'json', content });
  } catch (reason) {
    given.delete(path);
    throw reason;
  }
  return path;
}

/** Remove a copy that is of no use, if it can be removed. */
export async function removeCopy(contents: ICopyContents, path: string): Promise<void> {
  await contents.delete(path).catch(() => undefined);
  given.delete(path);
}
