# SPDX-License-Identifier: Apache-2.0
"""The compute driver: Nova's libvirt driver, with our image backend.

``compute_driver = fastboot.FastbootLibvirtDriver``. It overrides only what
would open a disk's chain by itself, or destroy a guest before looking.
Imports nova; only nova-compute loads it.
"""

import contextlib
import copy
import functools
import hashlib
import os
import pathlib
import re
import time
import types
from typing import Any, Final

import nova.conf
import nova.privsep.path
import os_resource_classes as orc
from lxml import etree
from nova import exception as nova_exception
from nova import objects
from nova.compute import power_state
from nova.virt.libvirt import driver, migration
from nova.virt.libvirt import guest as libvirt_guest
from nova.virt.libvirt import utils as libvirt_utils
from oslo_log import log as logging
from oslo_utils import fileutils, units

from fastboot_common import chain, exception, files, overlay, qemu
from fastboot_nova import backend, hold, spawn

LOG = logging.getLogger(__name__)
CONF = nova.conf.CONF

#: What other hosts know a host with this driver by: a key in the statistics
#: of its compute node, and the end of a file's name.
MARK: Final = 'fastboot'
#: The end of that name, by the destination of a live migration: whether it has
#: all blocks that the server's disks need, and a digest of where they are.
_WORD: Final = re.compile(r'.*\.(complete|lazy)-([0-9a-f]{16})')
#: Seconds until digests of what a disk lies on are told, and until what
#: differs is in the disk.
_COMPARE_SECONDS: Final = 1800.0
_LOOK_SECONDS: Final = 1.0
_COPY_SECONDS: Final = 3600.0


class FastbootLibvirtDriver(driver.LibvirtDriver):
    """Starts servers from local blocks where they are, else as Nova does."""

    def __init__(self, virtapi: Any, read_only: bool = False) -> None:
        super().__init__(virtapi, read_only)
        #: GiB that fastboot holds of Nova's disk, as last known.
        self._held = 0
        self._is_local = False
        #: Servers that are being started for the first time.
        self._new: set[str] = set()
        #: Those of them that were resumed.
        self._resumed: set[str] = set()
        kind = self.image_backend.backend()
        if kind is not driver.imagebackend.Qcow2:
            LOG.warning(
                'fastboot: disks are of the kind %s here ([libvirt] '
                'images_type); only qcow2 can lie on local blocks. All '
                'servers take the stock path.', kind.__name__)
            return
        self.image_backend.BACKEND.update(
            qcow2=backend.FastbootQcow2, default=backend.FastbootQcow2)
        self._is_local = True

    # New servers

    def spawn(self, context: Any, instance: Any, *args: Any,
              **kwargs: Any) -> None:
        """As Nova's."""
        try:
            super().spawn(context, instance, *args, **kwargs)
        finally:
            self._resumed.discard(instance.uuid)

    def get_info(self, instance: Any, use_cache: bool = True) -> Any:
        """Nova's; but a server that was resumed did run.

        Nova waits without end to see a new server run. What this one did
        since, it is told when the server is built.
        """
        info = super().get_info(instance, use_cache=use_cache)
        if (instance.uuid in self._resumed
                and info.state == power_state.SHUTDOWN):
            info.state = power_state.RUNNING
        return info

    def _create_guest_with_network(
            self, context: Any, xml: str, instance: Any, *args: Any,
            cleanup_instance_disks: bool = False, **kwargs: Any) -> Any:
        # Nova says so of disks that it has just made.
        new = self._new if cleanup_instance_disks else set()
        new.add(instance.uuid)
        try:
            return super()._create_guest_with_network(
                context, xml, instance, *args,
                cleanup_instance_disks=cleanup_instance_disks, **kwargs)
        finally:
            new.discard(instance.uuid)

    def _create_guest(
            self, context: Any, xml: str, instance: Any,
            power_on: bool = True, pause: bool = False,
            post_xml_callback: Any = None) -> Any:
        if self._is_local and instance.uuid in self._new and power_on:
            guest = spawn.attempt(self._host, xml, instance,
                                  post_xml_callback or (lambda: None))
            if guest is not None:
                self._resumed.add(instance.uuid)
                if not pause:
                    guest.resume()
                return guest
        return super()._create_guest(context, xml, instance, power_on, pause,
                                     post_xml_callback)

    # Pause

    def pause(self, instance: Any) -> None:
        """As Nova's; the agent does not resume it.

        It resumes those that stand still for want of a block.
        """
        domain = self._host.get_guest(instance)._domain
        self._hold(hold.mark, domain, instance)
        try:
            super().pause(instance)
            state = _state(domain)
            if state[0] == driver.libvirt.VIR_DOMAIN_RUNNING:
                # It stood still, and the agent was about to resume it.
                super().pause(instance)
                state = _state(domain)
        except BaseException:
            self._hold(hold.unmark, domain, instance)
            raise
        if state != hold.WAITING:
            self._hold(hold.unmark, domain, instance)

    def unpause(self, instance: Any) -> None:
        """As Nova's."""
        self._hold(hold.unmark, self._host.get_guest(instance)._domain,
                   instance)
        super().unpause(instance)

    def _hold(self, change: Any, domain: Any, instance: Any) -> None:
        """Mark a server on local blocks, or unmark it, if that can be."""
        try:
            if self._stubs(instance):
                change(domain)
        except (driver.libvirt.libvirtError, OSError) as error:
            LOG.warning('fastboot: the agent is not told of the pause: %s',
                        error, instance=instance)

    # Volumes

    def _swap_volume(self, guest: Any, disk_dev: str, conf: Any,
                     resize_to: int) -> None:
        """As Nova's, which then defines what runs: of a resumed server the
        template, which would boot with a part of its memory.

        Nova takes whatever is raised for a swap that was not done; it was.
        """
        if not spawn.is_resumed(guest.get_xml_desc()):
            super()._swap_volume(guest, disk_dev, conf, resize_to)
            return
        defined = guest.get_xml_desc(dump_inactive=True, dump_sensitive=True)
        super()._swap_volume(guest, disk_dev, conf, resize_to)
        try:
            self._host.write_instance_config(spawn.with_disk(
                defined, guest.get_xml_desc(dump_sensitive=True), disk_dev))
        except (driver.libvirt.libvirtError,
                exception.FastbootError) as error:
            LOG.error('fastboot: %s has another volume now, but the machine '
                      'of the µVM as its definition, until its next hard '
                      'reboot: %s', guest.uuid, error)

    # Placement

    def update_provider_tree(
            self, provider_tree: Any, nodename: str,
            allocations: dict[str, Any] | None = None) -> None:
        """As Nova's; of the disk, what fastboot holds is reserved.

        Placement counts flavors, not files: it would promise that space.
        """
        super().update_provider_tree(provider_tree, nodename, allocations)
        inventory = provider_tree.data(nodename).inventory
        disk = inventory.get(orc.DISK_GB)
        if disk and self._is_local and CONF.fastboot.reserve_disk:
            self._look_what_is_held()
            # More than there is, Placement refuses.
            disk['reserved'] = min(
                disk['total'], disk['reserved'] + self._held)
            provider_tree.update_inventory(nodename, inventory)

    def _look_what_is_held(self) -> None:
        """While the agent is away, what was known stays."""
        try:
            path, count = backend.agent().held()
            shared = (path.stat().st_dev
                      == pathlib.Path(CONF.instances_path).stat().st_dev)
        except (exception.FastbootError, OSError) as error:
            LOG.debug('fastboot: what it holds is not known: %s', error)
            return
        self._held = -(-count // units.Gi) if shared else 0

    def _destroy(self, instance: Any) -> None:
        # The way of all that ends a guest: nobody starts one anew that has
        # just rebooted, under the hands of Nova.
        try:
            if self._stubs(instance):
                spawn.leave(instance)
        except Exception as error:
            # A server can be ended, whatever there is.
            LOG.warning('fastboot: the agent is not told of the end: %s',
                        error, instance=instance)
        self._resumed.discard(instance.uuid)
        super()._destroy(instance)

    def finish_revert_migration(self, context: Any, instance: Any,
                                *args: Any, **kwargs: Any) -> None:
        """As Nova's; what the disks lie on may have gone meanwhile.

        The server was another host's, and Nova's cache manager is quicker
        with stubs than with bases.
        """
        try:
            self._prepare(instance, self._stubs(instance, '_resize'))
        except nova_exception.InvalidDiskInfo as error:
            # It fails where Nova can go on from.
            LOG.warning('fastboot: %s', error, instance=instance)
        super().finish_revert_migration(context, instance, *args, **kwargs)

    def _hard_reboot(self, context: Any, instance: Any, *args: Any,
                     **kwargs: Any) -> Any:
        # Nova destroys the domain first and makes missing bases last. Also
        # the way of every start (power_on, resume_state_on_host_boot).
        self._prepare(instance, self._stubs(instance))
        return super()._hard_reboot(context, instance, *args, **kwargs)

    def reboot(self, context: Any, instance: Any, network_info: Any,
               reboot_type: str, *args: Any, **kwargs: Any) -> Any:
        """As Nova's; also a soft one ends what runs, and starts it anew.

        :raises InvalidDiskInfo: it could not be started; it runs on.
        """
        if reboot_type == 'SOFT':
            self._prepare(instance, self._stubs(instance))
        return super().reboot(context, instance, network_info, reboot_type,
                              *args, **kwargs)

    def rescue(self, context: Any, instance: Any, *args: Any,
               **kwargs: Any) -> None:
        """As Nova's, which has switched the server off.

        :raises InvalidDiskInfo: what its disk lies on does not come.
        """
        self._prepare(instance, self._stubs(instance))
        super().rescue(context, instance, *args, **kwargs)

    def unrescue(self, context: Any, instance: Any) -> None:
        """As Nova's.

        :raises InvalidDiskInfo: the server could not be started; what it is
            rescued with runs on.
        """
        stubs = self._stubs(instance)
        self._prepare(instance, {
            disk: stub for disk, stub in stubs.items()
            if not disk.endswith('.rescue')})
        if stubs:
            self._renew_kept(instance)
        super().unrescue(context, instance)

    @staticmethod
    def _renew_kept(instance: Any) -> None:
        # Like what is saved of a suspended server.
        path = pathlib.Path(libvirt_utils.get_instance_path(instance),
                            'unrescue.xml')
        try:
            renewed = backend.renewed(path.read_text())
            if renewed is not None:
                files.write_atomically(path, renewed.encode())
        except (exception.FastbootError, OSError) as error:
            raise nova_exception.InvalidDiskInfo(
                reason=f'{path}: {error}') from error

    def pre_live_migration(self, context: Any, instance: Any, *args: Any,
                           **kwargs: Any) -> Any:
        """See to it that this host, the destination, has the chain.

        Nova makes disks and bases only where hosts do not share them; the
        volume below them is never shared.
        """
        data = super().pre_live_migration(context, instance, *args, **kwargs)
        stubs = self._stubs(instance)
        self._prepare(instance, stubs)
        if stubs:
            # The file was there to be looked for before this.
            data.filename = f'{data.filename}.{"-".join(_word(stubs))}'
        return data

    def _stubs(self, instance: Any, end: str = '') -> dict[str, pathlib.Path]:
        """The disks of a server that lie on stubs.

        :param end: of the name of the server's directory.
        """
        if not self._is_local:
            return {}
        directory = pathlib.Path(
            libvirt_utils.get_instance_path(instance) + end)
        disks = map(str, overlay.disks(directory.parent, directory.name))
        return {disk: stub for disk in disks
                if (stub := backend.stub_of(disk)) is not None}

    def _prepare(self, instance: Any,
                 stubs: dict[str, pathlib.Path]) -> None:
        """Have here what the disks of a server lie on.

        :raises InvalidDiskInfo: it does not come, within ``[fastboot]
            patience`` for all of them.
        """
        deadline = backend.patience()
        for disk, stub in stubs.items():
            image = self.image_backend.by_libvirt_path(instance, disk)
            image.restore(stub, instance.image_ref, deadline)
            backend.check_chain(disk, deadline)

    # Hosts without this driver, or without disks in qcow2. One would download
    # the image to the name of our stub, and fail to open it, after the server
    # was moved.

    def get_available_resource(self, nodename: str) -> Any:
        """Nova's, and that this host has this driver."""
        found = super().get_available_resource(nodename)
        if self._is_local:
            found['stats'] = {**(found.get('stats') or {}), MARK: 'true'}
        return found

    def _create_shared_storage_test_file(self, instance: Any) -> str:
        # The one word of ours that reaches the source of a live migration
        # whose destination the scheduler chose: the object that the two
        # exchange has no room for others.
        name: str = super()._create_shared_storage_test_file(instance)
        if not self._is_local:
            return name
        marked = f'{name}.{MARK}'
        directory = pathlib.Path(CONF.instances_path)
        (directory / name).rename(directory / marked)
        return marked

    def check_can_live_migrate_source(
            self, context: Any, instance: Any, dest_check_data: Any,
            *args: Any, **kwargs: Any) -> Any:
        """Nova's check, and whether the destination has this driver.

        :raises MigrationPreCheckError: it has not, and is needed; or the
            guest stands still, because blocks of its disk do not come.
        """
        if self._stubs(instance):
            if not dest_check_data.filename.endswith(f'.{MARK}'):
                raise nova_exception.MigrationPreCheckError(
                    reason=_refusal('the destination'))
            self._check_not_waiting(instance)
        return super().check_can_live_migrate_source(
            context, instance, dest_check_data, *args, **kwargs)

    def _check_not_waiting(self, instance: Any) -> None:
        # libvirt would have it paused by a user at the destination, where
        # nobody would let it go on (9.0).
        waiting = [driver.libvirt.VIR_DOMAIN_PAUSED,
                   driver.libvirt.VIR_DOMAIN_PAUSED_IOERROR]
        if self._host.get_guest(instance)._domain.state() == waiting:
            raise nova_exception.MigrationPreCheckError(
                reason='the server stands still, because blocks of its disk '
                       'cannot be read now; it goes on, and can be '
                       'migrated, once fastboot-agent and its repository '
                       'are back')

    # What is suspended

    def resume(self, context: Any, instance: Any, *args: Any,
               **kwargs: Any) -> None:
        """As Nova's, once the guest can go on.

        Nova throws away the memory of one that cannot.

        :raises InstanceFaultRollback: it cannot now, and stays suspended.
        """
        try:
            stubs = self._stubs(instance)
            self._prepare(instance, stubs)
            if stubs:
                self._renew_saved(instance)
        except nova_exception.InvalidDiskInfo as error:
            raise nova_exception.InstanceFaultRollback(error) from error
        super().resume(context, instance, *args, **kwargs)

    def _renew_saved(self, instance: Any) -> None:
        """Have what libvirt saved of a guest name its chain as it is now.

        It may name a block device that another volume has since the host
        was started, or an export that is not needed any more.

        :raises InvalidDiskInfo: that cannot be.
        """
        libvirt = driver.libvirt
        try:
            domain = self._host.get_guest(instance)._domain
            if not domain.hasManagedSaveImage():
                return
            renewed = backend.renewed(domain.managedSaveGetXMLDesc(
                libvirt.VIR_DOMAIN_SAVE_IMAGE_XML_SECURE))
            if renewed is not None:
                domain.managedSaveDefineXML(renewed)
        except nova_exception.InstanceNotFound:
            return
        except (exception.FastbootError, libvirt.libvirtError) as error:
            raise nova_exception.InvalidDiskInfo(
                reason=f'what is saved of the server cannot be resumed: '
                       f'{error}') from error

    def _wait_for_running(self, instance: Any) -> None:
        # Of a resume. A guest that stood still when it was suspended does
        # so when it is restored, and Nova would wait for ever.
        with contextlib.suppress(driver.libvirt.libvirtError):
            domain = self._host.get_guest(instance)._domain
            if domain.state()[0] == driver.libvirt.VIR_DOMAIN_PAUSED:
                domain.resume()
        super()._wait_for_running(instance)

    def migrate_disk_and_power_off(
            self, context: Any, instance: Any, dest: str, *args: Any,
            **kwargs: Any) -> Any:
        """Nova's, if the destination has this driver or needs none.

        :raises InstanceFaultRollback: it has not, and is needed.
        """
        if self._stubs(instance):
            self._check_destination(context, instance)
        return super().migrate_disk_and_power_off(
            context, instance, dest, *args, **kwargs)

    @staticmethod
    def _check_destination(context: Any, instance: Any) -> None:
        # This one: a crash may have left others under way.
        found = objects.Migration.get_by_id_and_instance(
            context, instance.migration_context.migration_id, instance.uuid)
        node = objects.ComputeNode.get_by_host_and_nodename(
            context, found.dest_compute, found.dest_node)
        if MARK not in (node.stats or {}):
            raise nova_exception.InstanceFaultRollback(
                nova_exception.MigrationPreCheckError(
                    reason=_refusal(found.dest_compute)))

    def cache_image(self, context: Any, image_id: str) -> bool:
        """Bring all of an image to this host, before any server."""
        try:
            if not self._is_local:
                raise exception.Invalid('[libvirt] images_type is not qcow2')
            backend.check_enabled()
            backend.agent().prepare(image_id)
        except exception.FastbootError as error:
            LOG.info('fastboot: image %s is cached the stock way: %s',
                     image_id, error)
            return bool(super().cache_image(context, image_id))
        return True

    @staticmethod
    def _rebase_with_qemu_img(source_path: str,
                              rebase_base: str | None) -> None:
        # Unshelve wants the base of the server's first image, and has asked
        # our backend for it before.
        stub = (rebase_base or '') + overlay.SUFFIX
        if rebase_base and not os.path.exists(rebase_base) \
                and os.path.exists(stub):
            if _rebase(pathlib.Path(source_path), pathlib.Path(stub)):
                return
            rebase_base = stub
        driver.LibvirtDriver._rebase_with_qemu_img(source_path, rebase_base)

    def _live_migration_operation(
            self, context: Any, instance: Any, dest: str,
            block_migration: bool, migrate_data: Any, guest: Any,
            device_names: list[str]) -> Any:
        """Nova's; returns why it failed, see :func:`_judge`."""
        describe = guest.get_xml_desc
        stubs, complete = self._stubs(instance), False

        @functools.wraps(describe)
        def portable(*args: Any, **kwargs: Any) -> str:
            return backend.portable(describe(*args, **kwargs), complete)

        guest.get_xml_desc = portable
        try:
            if stubs:
                # It may have come to stand still since it was asked for.
                self._check_not_waiting(instance)
                complete = _is_complete(stubs, migrate_data.filename)
            own = self._definition(instance, migrate_data, guest)
            if own:
                guest.migrate = functools.partial(_migrate, guest, own)
            super()._live_migration_operation(
                context, instance, dest, block_migration, migrate_data,
                guest, device_names)
        except (driver.libvirt.libvirtError, exception.FastbootError,
                nova_exception.MigrationPreCheckError, OSError) as error:
            if not stubs:
                raise
            # Nova 34 would have the server in ERROR after it has rolled all
            # back, if this was raised.
            LOG.error('fastboot: the server stays here, its migration '
                      'failed: %s', error, instance=instance)
            return error
        return None

    def _live_migration_monitor(
            self, context: Any, instance: Any, guest: Any, dest: str,
            post_method: Any, recover_method: Any, block_migration: bool,
            migrate_data: Any, future: Any, disk_paths: list[str]) -> None:
        if self._stubs(instance):
            _judge(guest, future)
        super()._live_migration_monitor(
            context, instance, guest, dest, post_method, recover_method,
            block_migration, migrate_data, future, disk_paths)

    def _definition(self, instance: Any, migrate_data: Any,
                    guest: Any) -> str | None:
        """What a resumed server is defined as at its next host.

        Nova would define there what runs here: the template, which would
        boot with a part of its memory, and be all that a reboot finds.
        """
        if not spawn.is_resumed(guest.get_xml_desc()):
            return None
        config = None
        if 'vifs' in migrate_data and migrate_data.vifs:
            config = functools.partial(
                self.vif_driver.get_config, instance=instance,
                image_meta=instance.image_meta, flavor=instance.flavor,
                virt_type=CONF.libvirt.virt_type)
        defined = types.SimpleNamespace(get_xml_desc=functools.partial(
            guest.get_xml_desc, dump_inactive=True))
        return str(migration.get_updated_guest_xml(
            instance, defined, migrate_data, self._get_volume_config,
            get_vif_config=config))

    def _live_snapshot(self, context: Any, instance: Any, guest: Any,
                       disk_path: str, out_path: str, source_format: str,
                       image_format: str, image_meta: Any) -> None:
        """As Nova's, but libvirt is not left to find the chain by itself.

        It would meet the volume's poison. The copy is a transient job, so
        the domain stays defined.
        """
        stub = backend.stub_of(disk_path) if self._is_local else None
        if stub is None:
            super()._live_snapshot(context, instance, guest, disk_path,
                                   out_path, source_format, image_format,
                                   image_meta)
            return
        self._check_quiesce(instance, image_meta)
        delta = pathlib.Path(out_path + '.delta')
        try:
            chain.make_disk(delta, stub, libvirt_utils.get_disk_size(
                disk_path, format=source_format))
            self._copy_top(context, instance, image_meta,
                           guest.get_block_device(disk_path), delta)
            nova.privsep.path.chown(str(delta), uid=os.getuid())
            libvirt_utils.extract_snapshot(str(delta), 'qcow2', out_path,
                                           image_format)
        finally:
            fileutils.delete_if_exists(str(delta))

    def _check_quiesce(self, instance: Any, image_meta: Any) -> None:
        try:
            self._can_quiesce(instance, image_meta)
        except nova_exception.NovaException as error:
            if image_meta.properties.get('os_require_quiesce', False):
                raise
            LOG.info('Quiescing instance not available: %s', error,
                     instance=instance)

    def _copy_top(self, context: Any, instance: Any, image_meta: Any,
                  device: Any, delta: pathlib.Path) -> None:
        """Copy what the guest wrote into `delta`, at one moment."""
        self._end_job(device)
        quiesced = False
        device.copy(_mirror(delta), shallow=True, reuse_ext=True,
                    transient=True)
        try:
            while not device.is_job_complete():
                time.sleep(0.5)
            try:
                self.quiesce(context, instance, image_meta)
                quiesced = True
            except nova_exception.NovaException as error:
                LOG.info('Skipping quiescing instance: %s', error,
                         instance=instance)
        finally:
            device.abort_job()
            if quiesced:
                self.unquiesce(context, instance, image_meta)

    @staticmethod
    def _end_job(device: Any) -> None:
        # One that failed before may still be there; none is the rule.
        try:
            device.abort_job()
        except Exception as error:
            LOG.debug('No block job to end: %s', error)


class _Defining:
    """A domain that is defined as told when it has migrated."""

    def __init__(self, domain: Any, definition: str) -> None:
        self._domain = domain
        self._definition = definition

    def migrateToURI3(self, destination: str, params: dict[str, Any],
                      flags: int) -> Any:
        """libvirt's."""
        return self._domain.migrateToURI3(destination, params={
            **params, 'persistent_xml': self._definition}, flags=flags)


def _migrate(guest: Any, definition: str, *args: Any, **kwargs: Any) -> None:
    """Nova's, which defines at the destination what runs here."""
    found = copy.copy(guest)
    found._domain = _Defining(guest._domain, definition)
    libvirt_guest.Guest.migrate(found, *args, **kwargs)


def _state(domain: Any) -> list[int]:
    """What libvirt says; if it says nothing, the guest may wait."""
    try:
        return list(domain.state())
    except driver.libvirt.libvirtError:
        return hold.WAITING


def _word(stubs: dict[str, pathlib.Path]) -> tuple[str, str]:
    """Whether what disks lie on is complete here, and a digest of its places.

    :raises FastbootError: something of it cannot be found.
    """
    links = [overlay.follow(stub) for stub in sorted(set(stubs.values()))]
    places = [(link.image_id, str(link.volume), link.start, link.size,
               link.virtual_size) for link in links]
    return ('complete' if all(link.complete for link in links) else 'lazy',
            hashlib.sha256(repr(places).encode()).hexdigest()[:16])


def _is_complete(stubs: dict[str, pathlib.Path], filename: str) -> bool:
    """Whether the destination of a live migration needs no export.

    The chain that goes there says where a slot is in the volume here, and
    reads whatever is at that place there.

    :param filename: as the destination gave it back; an older one says
        nothing.
    :raises MigrationPreCheckError: there it is not where it is here.
    """
    told = _WORD.fullmatch(filename)
    if told is None:
        return False
    if told[2] != _word(stubs)[1]:
        raise nova_exception.MigrationPreCheckError(
            reason='the volumes of both hosts are not alike, so the disk '
                   'cannot be opened there as it is here: see that '
                   'repository, state_dir and [host] volume_size are the '
                   'same, or migrate the server when it is off')
    return told[1] == 'complete'


def _rebase(disk: pathlib.Path, stub: pathlib.Path) -> bool:
    """Set a disk on a stub by what digests say; whether that was done.

    Nova's way reads the disk and all of the image, what is not on this host
    over the network.
    """
    try:
        size = (overlay.read_backing(disk) or (None, 0))[1]
        extents = [
            (offset, min(length, size - offset)) for offset, length in
            _differences(overlay.follow(stub).image_id, _base(disk))
            if offset < size]
        qemu.copy_up(disk, extents, timeout=_COPY_SECONDS)
        qemu.rename_backing(disk, stub, 'qcow2')
    except (exception.FastbootError, OSError) as error:
        LOG.info('fastboot: %s is compared with %s by reading both: %s',
                 disk, stub, error)
        return False
    LOG.info('fastboot: %s lies on %s now; %d bytes of what it lay on '
             'differ', disk, stub, sum(length for _, length in extents))
    return True


def _base(disk: pathlib.Path) -> pathlib.Path | str:
    """What a disk lies on: a file of raw bytes, or an image on local blocks.

    :raises Invalid: it is something else. The disk says what, not the base,
        which the guest of another disk may have written.
    """
    found, kind = overlay.read_backing(disk), overlay.backing_format(disk)
    if found and found[0] and kind == 'raw':
        return pathlib.Path(found[0])
    stub = backend.stub_of(str(disk)) if kind == 'qcow2' else None
    if stub is None:
        raise exception.Invalid(f'{disk} lies on a base of format {kind}')
    return overlay.follow(stub).image_id


def _differences(image_id: str, base: pathlib.Path | str,
                 ) -> list[tuple[int, int]]:
    """See :meth:`client.Agent.differences`; patient with others who ask."""
    deadline = time.monotonic() + _COMPARE_SECONDS
    while True:
        try:
            return backend.agent(_COMPARE_SECONDS).differences(
                image_id, base)
        except exception.Busy:
            if time.monotonic() > deadline:
                raise
        time.sleep(_LOOK_SECONDS)


def _judge(guest: Any, future: Any) -> None:
    """Have a migration's own end say whether the guest has moved.

    Nova takes one that ended for one that has moved, and removes its disks.
    A resumed guest ends when it reboots: before its migration begins, or
    while it goes on, which fails then.

    :param future: of the migration; a result is why it failed.
    """
    libvirt = driver.libvirt
    ask = guest.get_job_info

    def failed() -> bool:
        return bool(future.exception() or future.result())

    @functools.wraps(ask)
    def get_job_info() -> Any:
        try:
            info = ask()
        except libvirt.libvirtError:
            # It ends just now.
            info = libvirt_guest.JobInfo(type=libvirt.VIR_DOMAIN_JOB_NONE)
        if info.type == libvirt.VIR_DOMAIN_JOB_COMPLETED:
            info.type = libvirt.VIR_DOMAIN_JOB_NONE
        return info

    # Where there is no job, Nova waits for the future, and asks this then.
    guest.is_active = failed
    guest.get_job_info = get_job_info


def _refusal(host: str) -> str:
    return (f'the disk lies on local blocks, which {host} cannot read: '
            f'compute_driver there is not fastboot.FastbootLibvirtDriver, or '
            f'images_type is not qcow2. Choose another host, or run '
            f'"fastbootctl host detach" on this one first')


def _mirror(delta: pathlib.Path) -> str:
    disk = etree.Element('disk', type='file')
    etree.SubElement(disk, 'driver', type='qcow2')
    etree.SubElement(disk, 'source', file=str(delta))
    # The end of what libvirt is to know: QEMU itself opens the rest.
    etree.SubElement(disk, 'backingStore')
    return str(etree.tostring(disk, encoding='unicode'))
