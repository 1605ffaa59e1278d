import { URLExt } from '@jupyterlab/coreutils';
import { ServerConnection } from '@jupyterlab/services';

import { EventParser } from './sse';
import type {
  IChoice,
  IErrorInfo,
  IGpus,
  IMeters,
  ISandboxInfo,
  ISnapshotInfo,
  ISnapshots,
  ServerEvent
} from './forms';
import {
  readError,
  readEvent,
  readGpus,
  readList,
  readMeters,
  readPort,
  readSandbox,
  readSnapshot,
  readSnapshots
} from './wire';

const ROOT = 'warmcell/api/v1';

/** An error that the server answered, or that it could not be reached. */
export class ApiError extends Error implements IErrorInfo {
  constructor(info: IErrorInfo) {
    super(info.message);
    this.name = 'ApiError';
    this.code = info.code;
    this.hint = info.hint;
  }

  readonly code: string;
  readonly hint: string;
}

/** What opening the event stream tells besides its events. */
export interface IStreamStart {
  /** The server's clock minus this page's, in seconds. */
  readonly skew_s: number;
}

/**
 * The REST of the Warmcell server extension. The one place of this package that talks to the server.
 */
export class Api {
  constructor(settings: ServerConnection.ISettings = ServerConnection.makeSettings()) {
    this._settings = settings;
  }

  /** The GPUs of the machine, with who holds them. */
  async gpus(): Promise<IGpus> {
    return readGpus(await this._json('GET', 'gpus'));
  }

  /** What is used now. */
  async meters(): Promise<IMeters> {
    return readMeters(await this._json('GET', 'meters'));
  }

  /** Ask whether a start with this choice would be possible; makes nothing. */
  async check(choice: IChoice): Promise<void> {
    await this._json('POST', 'check', { spec: specOf(choice) });
  }

  /** Set what the next start of a kernel uses. */
  async configure(kernelId: string, choice: IChoice): Promise<void> {
    await this._json('PUT', `kernels/${encodeURIComponent(kernelId)}/settings`, specOf(choice));
  }

  /** Save a sandbox's memory and end its processes. */
  async suspend(id: string): Promise<void> {
    await this._json('POST', `sandboxes/${encodeURIComponent(id)}/suspend`, {});
  }

  /** Have a suspended sandbox go on. */
  async resume(id: string): Promise<void> {
    await this._json('POST', `sandboxes/${encodeURIComponent(id)}/resume`, {});
  }

  /** Give a sandbox's GPU back and keep it alive. */
  async park(id: string): Promise<void> {
    await this._json('POST', `sandboxes/${encodeURIComponent(id)}/park`, {});
  }

  /** A cell of a parked sandbox is likely to come. */
  async wake(id: string, returned: boolean): Promise<void> {
    await this._json('POST', `sandboxes/${encodeURIComponent(id)}/wake`, { returned });
  }

  /** Give the kernel of a sandbox another GPU, or none. */
  async changeGpu(id: string, gpu: string | readonly string[] | null): Promise<void> {
    await this._json('POST', `sandboxes/${encodeURIComponent(id)}/gpu`, { gpu });
  }

  /** Have a sandbox wait for a GPU no longer. */
  async leaveQueue(id: string): Promise<void> {
    await this._json('DELETE', `sandboxes/${encodeURIComponent(id)}/queue`);
  }

  /** Clone a sandbox and its kernel once, as it is or as it was in a snapshot. */
  async fork(id: string, snapshot?: string): Promise<ISandboxInfo> {
    const answer = await this._json('POST', `sandboxes/${encodeURIComponent(id)}/fork`, {
      n: 1,
      ...(snapshot === undefined ? {} : { snapshot })
    });
    const [clone] = readList(answer, 'sandboxes', readSandbox);
    if (clone === undefined) {
      throw new ApiError({ code: 'protocol', message: 'The fork has no clone.', hint: '' });
    }
    return clone;
  }

  /** Have the kernel of a clone listed by the server. */
  async open(id: string): Promise<void> {
    await this._json('POST', `sandboxes/${encodeURIComponent(id)}/open`, {});
  }

  /** Where a browser sees what listens on a port of a sandbox, for an hour. */
  async portUrl(id: string, port: number): Promise<string> {
    const path = `sandboxes/${encodeURIComponent(id)}/ports/${port}`;
    const at = readPort(await this._json('POST', path, {}));
    if (at.host === null) {
      return URLExt.join(this._settings.baseUrl, at.path);
    }
    const { protocol, port: own } = new URL(this._settings.baseUrl);
    const host = own === '' || at.host.includes(':') ? at.host : `${at.host}:${own}`;
    return `${protocol}//${host}${at.path}`;
  }

  /** End a sandbox. */
  async stop(id: string): Promise<void> {
    await this._json('DELETE', `sandboxes/${encodeURIComponent(id)}`);
  }

  /** Save a sandbox's kernel under a name. */
  async saveSnapshot(id: string, name: string): Promise<ISnapshotInfo> {
    const path = `sandboxes/${encodeURIComponent(id)}/snapshot`;
    return readSnapshot(await this._json('POST', path, { name }));
  }

  /** All snapshots. */
  async snapshots(): Promise<ISnapshots> {
    return readSnapshots(await this._json('GET', 'snapshots'));
  }

  /** Put a sandbox's kernel back to a snapshot. */
  async restoreSnapshot(id: string, snapshotId: string): Promise<void> {
    const path = `sandboxes/${encodeURIComponent(id)}/restore`;
    await this._json('POST', path, { snapshot: snapshotId });
  }

  /** Remove a snapshot. */
  async removeSnapshot(snapshotId: string): Promise<void> {
    await this._json('DELETE', `snapshots/${encodeURIComponent(snapshotId)}`);
  }

  /** Give a snapshot another name. */
  async renameSnapshot(snapshotId: string, name: string): Promise<ISnapshotInfo> {
    const path = `snapshots/${encodeURIComponent(snapshotId)}`;
    return readSnapshot(await this._json('PATCH', path, { name }));
  }

  /** Where a snapshot is had as a file. */
  snapshotUrl(snapshotId: string): string {
    return this._url(`snapshots/${encodeURIComponent(snapshotId)}/export`);
  }

  /** Bring in such a file. */
  async importSnapshot(file: Blob): Promise<ISnapshotInfo> {
    const headers = { 'Content-Type': 'application/zstd' };
    const response = await this._request('snapshots/import', {
      method: 'POST',
      body: file,
      headers
    });
    return readSnapshot((await response.json()) as unknown);
  }

  /**
   * Read the event stream until it ends or `signal` aborts.
   *
   * @throws {@link ApiError} if it cannot be opened or breaks.
   */
  async events(
    signal: AbortSignal,
    opened: (start: IStreamStart) => void,
    receive: (event: ServerEvent) => void
  ): Promise<void> {
    const began = Date.now();
    const response = await this._request('events', {
      method: 'GET',
      signal,
      headers: { Accept: 'text/event-stream' }
    });
    if (response.body === null) {
      throw new ApiError({ code: 'protocol', message: 'The event stream is empty.', hint: '' });
    }
    const date = Date.parse(response.headers.get('Date') ?? '');
    opened({ skew_s: Number.isNaN(date) ? 0 : skew(date, began, Date.now()) / 1000 });
    const parser = new EventParser();
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) {
        return;
      }
      for (const { kind, data } of parser.push(value)) {
        const event = readEvent(kind, data);
        if (event !== null) {
          receive(event);
        }
      }
    }
  }

  private _url(path: string): string {
    return URLExt.join(this._settings.baseUrl, ROOT, path);
  }

  private async _json(method: string, path: string, body?: unknown): Promise<unknown> {
    const response = await this._request(path, {
      method,
      ...(body === undefined ? {} : { body: JSON.stringify(body) })
    });
    return response.status === 204 ? null : ((await response.json()) as unknown);
  }

  private async _request(path: string, init: RequestInit): Promise<Response> {
    const url = this._url(path);
    let response: Response;
    try {
      response = await ServerConnection.makeRequest(url, init, this._settings);
    } catch (reason) {
      throw new ApiError({
        code: 'unreachable',
        message: reason instanceof Error ? reason.message : String(reason),
        hint: ''
      });
    }
    if (!response.ok) {
      throw new ApiError(await errorOf(response));
    }
    return response;
  }

  private readonly _settings: ServerConnection.ISettings;
}

/**
 * How far the server's clock is ahead, in milliseconds: nothing, if it said its whole second between question and answer.
 */
function skew(second: number, asked: number, answered: number): number {
  const least = second - answered;
  const most = second + 1000 - asked;
  return least <= 0 && most >= 0 ? 0 : (least + most) / 2;
}

/** A choice as the partial spec that the server reads. */
function specOf({ memory_bytes, ...rest }: IChoice): Record<string, unknown> {
  return memory_bytes === undefined ? rest : { ...rest, limits: { memory_bytes } };
}

async function errorOf(response: Response): Promise<IErrorInfo> {
  const fallback = `${response.status} ${response.statusText}`.trim();
  try {
    const error = readError((await response.json()) as unknown);
    return { ...error, message: error.message || fallback };
  } catch {
    // Not an answer of ours: where the server extension is absent, Jupyter itself says 404 as a page.
    return { code: response.status === 404 ? 'absent' : 'error', message: fallback, hint: '' };
  }
}
