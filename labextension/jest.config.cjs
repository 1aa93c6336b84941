// Only what has no JupyterLab in it is tested here; the rest is tested in a real one, in tests/jupyter/test_panel_in_lab.py.
module.exports = {
  testEnvironment: 'jsdom',
  testMatch: ['<rootDir>/tests/**/*.test.ts'],
  transform: { '^.+\\.ts$': ['ts-jest', { tsconfig: 'tsconfig.test.json' }] }
};
