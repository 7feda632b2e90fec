"""A client of librbd that shares no code with poolshift: the writer and the plain reader of the tests on Ceph.

Run by librbd.rs as: python3 librbd.py CEPH_CONF USER. A request is a line of words on standard input, the last of
them the number of payload bytes that follow; the answer is a line `ok N` or `error N` and N bytes.
"""

import hashlib
import random
import os
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import rados
import rbd

cluster = rados.Rados(conffile=sys.argv[1], rados_id=sys.argv[2])
# Clones without protecting their parent first.
cluster.conf_set("rbd_default_clone_format", "2")
cluster.connect()
contexts = {}
writers = {}
hammers = {}


def context(place):
    """POOL/[NAMESPACE/]IMAGE -> the I/O context and the image's name."""
    *where, image = place.split("/")
    key = tuple(where)
    if key not in contexts:
        contexts[key] = cluster.open_ioctx(where[0])
        if len(where) > 1:
            contexts[key].set_namespace(where[1])
    return contexts[key], image


def writer(place):
    """The handle through which an image is written; it stays open, as a server's does."""
    if place not in writers:
        writers[place] = rbd.Image(*context(place))
    return writers[place]


class Hammer:
    """Writes and discards at random, from several threads at once, until it is told to stop."""

    def __init__(self, image, seed, threads=3):
        self.image, self.stopped, self.error, self.count = image, threading.Event(), None, 0
        self.threads = [threading.Thread(target=self.run, args=(seed * 100 + n,)) for n in range(threads)]
        for thread in self.threads:
            thread.start()

    def run(self, seed):
        numbers, size = random.Random(seed), self.image.size()
        try:
            while not self.stopped.is_set():
                offset = numbers.randrange(size)
                length = min(numbers.choice([512, 4096, 4096, 70_000, 600_000]), size - offset)
                if numbers.randrange(4):
                    self.image.write(numbers.randbytes(length), offset)
                elif numbers.randrange(2):
                    self.image.discard(offset, length)
                else:
                    self.image.write_zeroes(offset, length)
                self.count += 1
        except Exception as error:
            self.error = error

    def stop(self):
        self.stopped.set()
        for thread in self.threads:
            thread.join()
        if self.error:
            raise self.error
        return str(self.count).encode()


def close(place):
    if place in writers:
        writers.pop(place).close()


def pieces(place):
    """The content of POOL/[NAMESPACE/]IMAGE[@SNAPSHOT], read plainly and whole, through a handle of its own."""
    place, _, snapshot = place.partition("@")
    ioctx, name = context(place)
    with rbd.Image(ioctx, name, snapshot or None, read_only=True) as image:
        size = image.size()
        for offset in range(0, size, 4 << 20):
            yield image.read(offset, min(4 << 20, size - offset))


def create(place, size, object_size, unit, count, features):
    ioctx, name = context(place)
    order = int(object_size).bit_length() - 1
    rbd.RBD().create(ioctx, name, int(size), order, old_format=False, features=int(features), stripe_unit=int(unit),
                     stripe_count=int(count))


def clone(parent, child):
    parent, snapshot = parent.split("@")
    ioctx, name = context(parent)
    rbd.RBD().clone(ioctx, name, snapshot, *context(child))


def remove(place):
    """Removes an image and its snapshots, once the watches of processes that were killed have timed out: 30 s after that,
    or after the last start of the OSD that has them, which other tests stop. The watch of one that was killed in the
    instant in which it opened the image may not time out before its OSD peers anew (Ceph 16.2.15: 137 of 1,711 kills)."""
    close(place)
    deadline = time.monotonic() + 240
    while True:
        try:
            with rbd.Image(*context(place)) as image:
                ids = [snapshot["id"] for snapshot in image.list_snaps()]
                # Each waits for the monitors' next proposal, one of which serves any number of them.
                with ThreadPoolExecutor(max(1, len(ids))) as pool:
                    list(pool.map(image.remove_snap_by_id, ids))
            rbd.RBD().remove(*context(place))
            return
        except rbd.ImageNotFound:
            return
        except (rbd.ImageBusy, rbd.ImageHasSnapshots, rbd.ReadOnlyImage) as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{error}; {who_has(place)}") from error
            time.sleep(0.5)


def who_has(place):
    """Who keeps an image from being removed, for whoever has to find out why."""
    ioctx, name = context(place)
    with rbd.Image(ioctx, name, read_only=True) as image:
        return f"watchers {list(image.watchers_list())}, lockers {image.list_lockers()}, " \
               f"snapshots {list(image.list_snaps())}"


def digest(place):
    whole = hashlib.sha256()
    for piece in pieces(place):
        whole.update(piece)
    return whole.hexdigest().encode()


def snapshots(place, users):
    """The names of a user's snapshots, or of those that are half removed."""
    ioctx, name = context(place)
    with rbd.Image(ioctx, name, read_only=True) as image:
        found = [snapshot for snapshot in image.list_snaps()
                 if (snapshot["namespace"] == rbd.RBD_SNAP_NAMESPACE_TYPE_USER) == users]
        return "\n".join(snapshot["name"] for snapshot in found).encode()


def objects(place, since=None):
    """The whole objects that librbd finds changed up to POOL/[NAMESPACE/]IMAGE[@SNAPSHOT]: a line `OFFSET LENGTH` each."""
    place, _, snapshot = place.partition("@")
    ioctx, name = context(place)
    found = []
    with rbd.Image(ioctx, name, snapshot or None, read_only=True) as image:
        image.diff_iterate(0, image.size(), since, lambda *extent: found.append("%d %d" % extent[:2]),
                           whole_object=True)
    return "\n".join(found).encode()


def spoil(place):
    """Overwrites the object map of HEAD with something that is none."""
    ioctx, name = context(place)
    with rbd.Image(ioctx, name, read_only=True) as image:
        ioctx.write_full("rbd_object_map." + image.id(), b"\x0e\x00\x00\x00nonsense")


def unclean(place):
    """Leaves all objects of HEAD's object map as they are between a snapshot and the cleaning of the map after it."""
    ioctx, name = context(place)
    with rbd.Image(ioctx, name, read_only=True) as image:
        count = -(-image.size() // (1 << image.stat()["order"]))
        oid = "rbd_object_map." + image.id()
    # object_map_update: from EXISTS_CLEAN (3) to EXISTS (1).
    ioctx.execute(oid, "rbd", "object_map_update", struct.pack("<QQBBB", 0, count, 1, 1, 3))


def trash_snapshot(place, snapshot):
    """Leaves a snapshot half removed, as a client that dies while it removes it does: only its id finds it."""
    ioctx, name = context(place)
    with rbd.Image(ioctx, name, read_only=True) as image:
        oid = "rbd_header." + image.id()
    ioctx.execute(oid, "rbd", "snapshot_trash_add", struct.pack("<Q", int(snapshot)))


def cut_rename(place, name):
    """Leaves another name that opens the image, as a client that dies while it renames does."""
    ioctx, old = context(place)
    ioctx.write_full("rbd_id." + name, ioctx.read("rbd_id." + old))


def cut_create(place):
    """Leaves a name without an image, as a client that dies while it creates one does: in the directory, no header."""
    ioctx, name = context(place)
    image = os.urandom(6).hex().encode()
    ioctx.write_full("rbd_id." + name, struct.pack("<I", len(image)) + image)
    entry = b"".join(struct.pack("<I", len(text)) + text for text in (name.encode(), image))
    ioctx.execute("rbd_directory", "rbd", "dir_add_image", entry)


def answer(words, payload):
    what, place, *rest = words
    if what == "create":
        create(place, *rest)
    elif what == "clone":
        clone(place, *rest)
    elif what == "write":
        writer(place).write(payload, int(rest[0]))
    elif what == "discard":
        writer(place).discard(int(rest[0]), int(rest[1]))
    elif what == "zero":
        writer(place).write_zeroes(int(rest[0]), int(rest[1]))
    elif what == "resize":
        writer(place).resize(int(rest[0]))
    elif what == "flush":
        writer(place).flush()
    elif what == "flatten":
        writer(place).flatten()
    elif what == "snap":
        writer(place).create_snap(rest[0])
    elif what == "rmsnap":
        writer(place).remove_snap(rest[0])
    elif what == "peek":
        return writer(place).read(int(rest[0]), int(rest[1]))
    elif what == "lock":
        writer(place).lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
    elif what == "open":
        writer(place)
    elif what == "owns":
        return str(int(writer(place).is_exclusive_lock_owner())).encode()
    elif what == "cut-rename":
        cut_rename(place, rest[0])
    elif what == "cut-create":
        cut_create(place)
    elif what == "trash-snapshot":
        trash_snapshot(place, rest[0])
    elif what == "hammer":
        hammers[place] = Hammer(writer(place), int(rest[0]))
    elif what == "hammered":
        return str(hammers[place].count).encode()
    elif what == "rest":
        return hammers.pop(place).stop()
    elif what == "read":
        return b"".join(pieces(place))
    elif what == "digest":
        return digest(place)
    elif what == "snapshots":
        return snapshots(place, True)
    elif what == "trashed":
        return snapshots(place, False)
    elif what == "objects":
        return objects(place, *rest)
    elif what == "spoil":
        spoil(place)
    elif what == "unclean":
        unclean(place)
    elif what == "throttle":
        with rbd.Image(*context(place)) as image:
            image.config_set("rbd_qos_write_bps_limit", rest[0])
    elif what == "close":
        close(place)
    elif what == "remove":
        for image in [place, *rest]:
            context(image)
        with ThreadPoolExecutor(1 + len(rest)) as pool:
            list(pool.map(remove, [place, *rest]))
    else:
        raise ValueError(what)
    return b""


def main():
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    for line in requests:
        *words, length = line.decode().split()
        payload = requests.read(int(length))
        try:
            kind, result = "ok", answer(words, payload)
        except Exception as error:  # whatever it is, the test that asked decides what it means
            kind, result = "error", f"{words[:2]}: {error!r}".encode()
        answers.write(f"{kind} {len(result)}\n".encode() + result)
        answers.flush()
    for place in list(writers):
        close(place)
    for ioctx in contexts.values():
        ioctx.close()
    cluster.shutdown()


main()
