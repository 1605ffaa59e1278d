import type { ISandboxInfo, ITemplateInfo, SandboxState, ServerEvent } from '../forms';

/** Everything that the event stream has told, as a value that is never changed in place. */
export interface IState {
  readonly sandboxes: ReadonlyMap<string, ISandboxInfo>;
  readonly templates: ReadonlyMap<string, ITemplateInfo>;
}

export const EMPTY: IState = { sandboxes: new Map(), templates: new Map() };

/** Sandboxes that ended by an error are kept for the page to explain, but not without bound. */
const KEPT_FAILURES = 50;

const ENDED: ReadonlySet<SandboxState> = new Set(['stopped', 'failed']);

export function isAlive(sandbox: ISandboxInfo): boolean {
  return !ENDED.has(sandbox.state);
}

/** Whether it has given up its GPU until its next cell. */
export function isAsleep(sandbox: ISandboxInfo): boolean {
  return sandbox.state === 'suspended' || sandbox.parked !== null;
}

/** Whether it can give its GPU back and live on. */
export function canPark(sandbox: ISandboxInfo | null): boolean {
  return (
    sandbox?.state === 'running' &&
    sandbox.kernel_id !== null &&
    sandbox.parked === null &&
    sandbox.gpus.length === 1
  );
}

/** What is known after `event`. */
export function reduce(state: IState, event: ServerEvent): IState {
  switch (event.kind) {
    case 'hello':
      // The server tells everything that it has, so what it does not tell is gone.
      return {
        sandboxes: trim(new Map(event.sandboxes.map(item => [item.id, item]))),
        templates: new Map(event.templates.map(item => [templateKey(item), item]))
      };
    case 'sandbox': {
      const sandboxes = new Map(state.sandboxes);
      if (event.sandbox.state === 'stopped') {
        sandboxes.delete(event.sandbox.id);
      } else {
        sandboxes.set(event.sandbox.id, event.sandbox);
      }
      return { ...state, sandboxes: trim(sandboxes) };
    }
    case 'template':
      return {
        ...state,
        templates: new Map(state.templates).set(templateKey(event.template), event.template)
      };
  }
}

/** The latest sandbox of a kernel; of equally old ones that which lives. */
export function ofKernel(state: IState, kernelId: string): ISandboxInfo | null {
  return latest(state, sandbox => sandbox.kernel_id === kernelId);
}

/**
 * The latest sandbox that a notebook asked for.
 *
 * The server tells a notebook by its path on the host; the page knows the path below the server's root, and the root
 * with the home directory written as "~". Other servers of the same user share the list, so the root matters.
 */
export function ofNotebook(state: IState, path: string, root: string): ISandboxInfo | null {
  const below = path.replace(/^\/+/, '');
  if (below === '') {
    return null;
  }
  const folder = root.replace(/\/+$/, '');
  const whole = `${folder}/${below}`;
  return latest(state, ({ notebook }) =>
    notebook === null
      ? false
      : folder.startsWith('~') || folder === ''
        ? notebook.endsWith(whole.replace(/^~/, ''))
        : notebook === whole
  );
}

function latest(state: IState, matches: (sandbox: ISandboxInfo) => boolean): ISandboxInfo | null {
  let found: ISandboxInfo | null = null;
  for (const sandbox of state.sandboxes.values()) {
    if (matches(sandbox) && (found === null || isLater(sandbox, found))) {
      found = sandbox;
    }
  }
  return found;
}

function isLater(one: ISandboxInfo, other: ISandboxInfo): boolean {
  return one.created_at === other.created_at
    ? isAlive(one) && !isAlive(other)
    : one.created_at > other.created_at;
}

/** Without failures that are of no interest any more: their notebook has another sandbox, or there are too many. */
function trim(sandboxes: Map<string, ISandboxInfo>): Map<string, ISandboxInfo> {
  const latest = new Map<string | null, number>();
  for (const { notebook, created_at } of sandboxes.values()) {
    latest.set(notebook, Math.max(created_at, latest.get(notebook) ?? 0));
  }
  for (const { id, state, notebook, created_at } of [...sandboxes.values()]) {
    if (state === 'failed' && notebook !== null && created_at < (latest.get(notebook) ?? 0)) {
      sandboxes.delete(id);
    }
  }
  const ended = [...sandboxes.values()]
    .filter(sandbox => !isAlive(sandbox))
    .sort((one, other) => one.created_at - other.created_at);
  for (const sandbox of ended.slice(0, Math.max(0, ended.length - KEPT_FAILURES))) {
    sandboxes.delete(sandbox.id);
  }
  return sandboxes;
}

function templateKey(template: ITemplateInfo): string {
  return `${template.name}\n${template.python}`;
}
