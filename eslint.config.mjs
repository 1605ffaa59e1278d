import eslint from '@eslint/js';
import prettier from 'eslint-config-prettier';
import globals from 'globals';
import tseslint from 'typescript-eslint';

export default tseslint.config(
  {
    ignores: [
      '.cache/',
      '.venv/',
      'build/',
      'dist/',
      'docs/_build/',
      'labextension/lib/',
      'src/warmcell/',
      'tests/browser/output/'
    ]
  },
  eslint.configs.recommended,
  {
    files: ['labextension/{src,test}/**/*.{ts,tsx}'],
    extends: [tseslint.configs.strictTypeChecked, tseslint.configs.stylisticTypeChecked],
    languageOptions: {
      globals: globals.browser,
      parserOptions: { projectService: true, tsconfigRootDir: import.meta.dirname }
    },
    rules: {
      eqeqeq: 'error',
      '@typescript-eslint/no-floating-promises': [
        'error',
        { allowForKnownSafeCalls: [{ from: 'package', name: 'test', package: 'node:test' }] }
      ],
      'no-console': 'error',
      '@typescript-eslint/no-extraneous-class': 'off', // Namespaced statics are a Lumino habit.
      '@typescript-eslint/no-namespace': 'off',
      '@typescript-eslint/unbound-method': 'off', // Lumino's connect() takes the receiver beside the method.
      '@typescript-eslint/restrict-template-expressions': ['error', { allowNumber: true }],
      '@typescript-eslint/naming-convention': [
        'error',
        { selector: 'interface', format: ['PascalCase'], custom: { regex: '^I[A-Z]', match: true } }
      ]
    }
  },
  {
    files: ['labextension/test/**/*.ts'],
    rules: {
      '@typescript-eslint/no-floating-promises': [
        'error',
        { allowForKnownSafeCalls: [{ from: 'package', package: 'node:test', name: ['test'] }] }
      ]
    }
  },
  {
    // The browser tests and other scripts run in Node.
    files: ['**/*.mjs'],
    languageOptions: { globals: { ...globals.node, ...globals.browser } }
  },
  {
    // It runs in sandboxes, in whatever node an image has.
    files: ['sandbox/guest/**/*.js'],
    languageOptions: { sourceType: 'commonjs', globals: globals.node }
  },
  prettier
);
