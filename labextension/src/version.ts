/** Version of this package; the server extension has the same. */
export const VERSION = '0.1.0';
