// Package qcow2 reads and writes QCOW2 disk images, versions 2 and 3, from any
// number of goroutines at once.
//
// # Use
//
// Create makes an image, Open opens one with its chain of backing files,
// OpenScratch puts a throw-away overlay over one. An Image is a disk: ReadAt,
// WriteAt and their vectored forms, WriteZeroes, PunchHole and Discard at any
// offset and length, Flush, Close. Map tells what its ranges are and where, Stats
// what it has done. WithContext gives a view of it whose requests end early once a
// context is done.
//
// Resize makes the disk longer or shorter while requests go on. CreateSnapshot,
// ApplySnapshot and DeleteSnapshot change the internal snapshots of an open image,
// which keeps requests waiting meanwhile; Options.Snapshot opens one for reading.
// AddBitmap, MergeBitmap and the like do so with persistent bitmaps, whose contents
// DirtyRanges returns.
//
// To merge an overlay into a file that it lies over, Options.Base opens that file
// for writing too, and Empty makes the overlay hold nothing afterwards. SetBacking
// names another file for it to lie over.
//
// Check counts all references in an image that nobody writes to and finds leaks
// and corruptions. It keeps what it counts in bounded memory and opens nothing but
// the image. Repair mends what Check finds: leaks only, or all that can be mended.
//
// # What is not done, and said by name
//
// Encryption and unknown incompatible features are refused with ErrUnsupported, an
// external data file with ErrBackingRefused unless Options allow it. An image that is marked corrupt is
// opened for reading only, until Repair has made it sound. WriteCompressed makes
// compressed clusters; any other write to one makes it a normal cluster. Internal
// snapshots are kept, as what they share is copied before it is written. Persistent
// bitmaps can be changed, but do not follow the disk: the first request that changes
// it marks those that did as in use, before that, so that no backup trusts them.
//
// # Trust
//
// No size, count or offset from a file is used before it is bounded, and every
// error names the file and the fault. A backing file is opened only if it lies
// in the directory of the image that names it or in one the caller lists, and
// only with a format that the image states. Backing files are opened for reading
// and locked like the image.
//
// # Locks and goroutines
//
// In the order in which they are taken:
//
//  1. Image.resizing, held from beginning to end by a Resize and by a change of
//     internal snapshots or of bitmaps; then Image.turns, held by Close and by whoever runs
//     something exclusively.
//  2. commits.running: held by the one goroutine that commits, across its I/O
//     and barriers. Flushes wait for it, and writers when too much is dirty.
//  3. refcounts.mu: held by the commit while it applies counts, and by the
//     search for free clusters, across their reads and writes.
//  4. Image.bitmapsMu: held across the marking of the persistent bitmaps.
//  5. Image.syncMu: held across each fdatasync, so that every caller after a
//     failed one learns of it.
//  6. Image.mu, the metadata lock: never held across I/O, on either side. The
//     shared side is for lookups; the exclusive one for changes to memory, and
//     short.
//
// The decoder of compressed clusters, and the budget that the caches of a chain
// share, have a lock each, with which no other is taken.
//
// Reads, and writes to clusters that the image owns alone, look up under the
// shared side, pin what they found, drop the lock, and move the data straight
// between the caller's buffers and the file. They allocate nothing. Slices of L2
// tables that are not in memory are read without the lock, by one goroutine for
// all that want them.
//
// A write to any other cluster reserves host clusters under the exclusive side
// and registers its guest range; fills them, with copy-on-write of what it does
// not cover at the head and the tail only, without the lock; and then publishes
// the new L2 entries under the exclusive side again. Requests that overlap a
// range being filled wait for that range and nothing else.
//
// Compressed clusters are packed one after the other into host clusters, each of
// which has as many references as compressed clusters touch it. A host cluster
// into which more may be packed is held: its count is not lowered meanwhile.
//
// Whole clusters are made zero by a flag in their entries, which hides the
// backing file; those that the image owns stay where they are, and their holes
// are punched, without the lock, while the guest range is registered.
//
// With extended L2 entries all this holds for the 32 subclusters of a cluster:
// each has its data in the host cluster, or is zero, or shows the backing file. A
// cluster with a standard entry is one subcluster, so the code knows no other
// difference. In an external data file each cluster has its place from the start:
// nothing is allocated there but in the tables, and nothing is counted.
//
// What changes the image as a whole runs exclusively: new requests wait, those
// under way end first, and no commit runs.
//
// One goroutine per writable image commits in the background when the dirty
// slices become many; Close stops it.
//
// # Pins and the reuse of clusters
//
// A cluster that lost a reference is used again only when (1) a commit has made
// the removal of the pointer durable, (2) every request that could have seen the
// pointer is over, which the epochs tell, (3) its count has been lowered to zero,
// and (4) the hole is punched that gives its space back to the host.
//
// # What is durable when
//
// Memory holds the newest L1 and L2 entries; reference counts follow at the
// commit. A commit takes the state at one instant and makes it durable in two
// phases, each ended by one fdatasync: A, raised counts, with guest data and new
// L2 tables that were written earlier; B, L2 slices and L1 entries. Without
// changed pointers there is no phase B. Counts are lowered in phase A of a later
// commit than the one whose phase B removed the pointers. Refcount blocks are
// made ahead of need with a barrier of their own, and a larger refcount table
// with two.
//
// A change of internal snapshots writes a new structure of counts, a new L1 table
// and new L2 tables where COPIED flags change, all to clusters that nothing points
// to. After a barrier one write of one sector of the header puts them in the place
// of the old ones, and after a second barrier those are let go.
//
// A change of bitmaps writes the new directory, and what it leads to, to clusters
// that a commit then counts. After that one write makes the extension in the header
// lead to it, or where there was none, several in an order in which each is of no
// effect without the last, and the clusters of the old directory lose their
// references.
//
// So at every instant, and after the loss of any unsynced writes, counts are at
// least as high as the number of pointers, pointers lead to complete contents,
// and qemu-img check finds leaks at worst.
//
// # The order of a repair
//
// A repair checks, does one kind of work, and checks again. First go pointers to
// reserved room that lies where none can be. Then counts rise and fall to the
// number of references, in place; or, if their structure is lost, a new one is
// written into free clusters and the header switched to it in one sector. Flags
// follow the counts. What needs another place, the snapshot table or data in a
// cluster of a table, is copied and counted before anything points to the copy.
// The marks of a dirty or corrupt image go last, once a check finds nothing. Each
// step is durable before the next, and leaves an image that is no worse.
package qcow2
