import type { ISettingRegistry } from '@jupyterlab/settingregistry';

/** What settings say; without a registry, what they say by default. */
export class Settings {
  /** Not before they are read. */
  connects = false;
  probes: string[] = [];
  side: 'left' | 'right' = 'right';

  /** `connect` is called when kernels may be asked from now on. */
  async read(registry: ISettingRegistry | null, id: string, connect: () => void): Promise<void> {
    const settings = await registry?.load(id).catch(() => null);
    const take = () => {
      const before = this.connects;
      this.connects = (settings?.get('autoConnect').composite as boolean | undefined) ?? true;
      this.probes = (settings?.get('probes').composite as string[] | undefined) ?? [];
      if (this.connects && !before) {
        connect();
      }
    };
    this.side = (settings?.get('side').composite as 'left' | 'right' | undefined) ?? 'right';
    take();
    settings?.changed.connect(take);
  }
}
