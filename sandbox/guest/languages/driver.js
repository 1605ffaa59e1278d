// JavaScript, or TypeScript, that keeps its variables from one piece of code to the next: see __init__.py.
// The evaluator is node's own of its read-eval-print loop, so `await` stands where it likes.
'use strict';
const fs = require('node:fs');
const net = require('node:net');
const path = require('node:path');
const repl = require('node:repl');
const module_ = require('node:module');
const { PassThrough } = require('node:stream');
const { inspect } = require('node:util');

const [requests, answers] = process.argv.slice(-2).map(Number);
const typescript = process.argv.includes('--typescript');
const LIBRARIES = [
  [
    'typescript',
    it => code =>
      it.transpileModule(code, { compilerOptions: { target: 'esnext', module: 'esnext' } })
        .outputText
  ],
  ['esbuild', it => code => it.transformSync(code, { loader: 'ts', target: 'esnext' }).code],
  [
    'sucrase',
    it => code => it.transform(code, { transforms: ['typescript'], disableESTransforms: true }).code
  ]
];
const GLOBAL = [
  path.join(process.execPath, '../../lib/node_modules'),
  '/usr/lib/node_modules',
  '/usr/share/nodejs'
];

function tell(...texts) {
  const parts = [Buffer.from(`${texts.length}\n`)];
  for (const text of texts) {
    const data = Buffer.from(String(text));
    parts.push(Buffer.from(`${data.length}\n`), data);
  }
  let left = Buffer.concat(parts);
  while (left.length > 0) {
    left = left.subarray(fs.writeSync(answers, left));
  }
}

// --- TypeScript without its types -----------------------------------------------------------------------------------

let without;
function stripper() {
  if (module_.stripTypeScriptTypes) {
    process.removeAllListeners('warning'); // It says once that it is an experiment.
    return code => {
      try {
        return module_.stripTypeScriptTypes(code, { mode: 'transform' });
      } catch (error) {
        if (error.code !== 'ERR_INVALID_ARG_VALUE') {
          throw error;
        }
        return module_.stripTypeScriptTypes(code, { mode: 'strip' });
      }
    };
  }
  const local = module_.createRequire(path.join(process.cwd(), 'code.js'));
  for (const [name, use] of LIBRARIES) {
    try {
      return use(require(local.resolve(name, { paths: [process.cwd(), ...GLOBAL] })));
    } catch (error) {
      if (error.code !== 'MODULE_NOT_FOUND') {
        throw error;
      }
    }
  }
  throw new Error(
    `TypeScript needs node 22.13 (this is ${process.version}), or the package typescript, esbuild or sucrase: ` +
      'take an image with one of them, or `npm install typescript`'
  );
}

// --- evaluation -------------------------------------------------------------------------------------------------------

const quiet = new PassThrough();
const loop = repl.start({
  prompt: '',
  input: new PassThrough(),
  output: quiet.resume(),
  terminal: false,
  useGlobal: true
});
// What is thrown in an evaluation comes here in some versions of node; later, it is nobody's.
let fail = error => console.error(error);
loop._domain?.removeAllListeners('error').on('error', error => fail(error));
process.on('uncaughtException', error => fail(error));
process.on('unhandledRejection', error => fail(error));
process.on('SIGINT', () =>
  fail(Object.assign(new Error('The code was interrupted'), { name: 'Interrupted' }))
);

async function evaluated(code) {
  try {
    return await new Promise((resolve, reject) => {
      fail = reject;
      loop.eval(code, loop.context, 'code', (error, value) =>
        error ? reject(error) : resolve(value)
      );
    });
  } catch (error) {
    throw error instanceof repl.Recoverable ? error.err : error;
  } finally {
    fail = error => console.error(error);
  }
}

/** Static imports as dynamic ones: the evaluator knows none. */
function imported(code) {
  const names = text => text.replace(/\s+as\s+/g, ': ');
  return code.replace(
    /^([ \t]*)import\s+(?:([\w$]+)\s*(?:,\s*)?)?(?:\*\s*as\s+([\w$]+)\s*)?(\{[^}]*\}\s*)?(?:from\s*)?(['"][^'"\n]+['"])\s*;?/gm,
    (_, space, whole, all, some, from) => {
      const wanted = [];
      if (whole) {
        wanted.push(`var { default: ${whole} } = await import(${from});`);
      }
      if (all) {
        wanted.push(`var ${all} = await import(${from});`);
      }
      if (some) {
        wanted.push(`var ${names(some.trim())} = await import(${from});`);
      }
      return space + (wanted.join(' ') || `await import(${from});`);
    }
  );
}

async function run(code) {
  try {
    if (typescript) {
      without ??= stripper();
      code = without(code);
    }
    let value;
    try {
      value = await evaluated(code);
    } catch (error) {
      if (!(
        error instanceof SyntaxError && /import statement|import declarations/.test(error.message)
      )) {
        throw error;
      }
      value = await evaluated(imported(code));
    }
    tell(
      'ok',
      ...(value === undefined ? [] : [typeof value === 'string' ? value : inspect(value)])
    );
  } catch (error) {
    const is =
      error instanceof Error || (typeof error === 'object' && error !== null && 'stack' in error);
    tell(
      'error',
      is ? error.name : 'Error',
      is ? error.message : inspect(error),
      is ? String(error.stack) : ''
    );
  }
}

// --- requests ---------------------------------------------------------------------------------------------------------

function become(changes) {
  for (const one of changes) {
    const at = one.indexOf('=');
    if (at < 0) {
      delete process.env[one];
    } else {
      process.env[one.slice(0, at)] = one.slice(at + 1);
    }
  }
}

let unread = Buffer.alloc(0);
function whole() {
  let at = 0;
  const number = () => {
    const end = unread.indexOf(10, at);
    const found = end < 0 ? NaN : Number(unread.subarray(at, end));
    at = end + 1;
    return found;
  };
  const texts = [];
  for (let left = number(); left !== 0; left--) {
    const length = Number.isNaN(left) ? NaN : number();
    if (Number.isNaN(length) || unread.length < at + length) {
      return null;
    }
    texts.push(unread.toString('utf8', at, at + length));
    at += length;
  }
  unread = unread.subarray(at);
  return texts;
}

const input = new net.Socket({ fd: requests, readable: true, writable: false });
input.on('data', piece => {
  unread = Buffer.concat([unread, piece]);
  const texts = whole();
  if (texts !== null) {
    become(texts.slice(1));
    run(texts[0]);
  }
});
input.on('end', () => process.exit(0));
