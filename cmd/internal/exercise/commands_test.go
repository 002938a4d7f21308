package exercise

// commandsToCompare are scripts of one or more commands, each run on what the ones
// before have left of an image of 4 MiB.
var commandsToCompare = []string{
	// Lines.
	"", "   ", "#", "# length", "foo", "length\t", "  length  ", "LENGTH", "l", "len",
	// How many arguments.
	"read", "read 0", "read 0 512 512", "write", "write 0", "write 0 1 2", "length x", "map x", "info x", "alloc", "alloc 0 1 2",
	"close x", "flush x", "aio_flush x", "sleep", "sleep 1 2", "sigraise", "sigraise 1 1", "help a b", "truncate", "truncate 1 2 3 4",
	"open", "open a b", "discard 0", "discard 1 1 1", "readv 0", "writev 0", "aio_read 0", "aio_write 0", "reopen x",
	"break", "break a", "resume", "wait_break", "remove_break",
	// Options.
	"read -x 0 1", "read --foo 0 1", "read -P", "read 0 -P", "read 0 1 -P", "read 0 512 -P 0", "read -P0 0 512", "read -qP 0 0 512",
	"read -- 0 512", "read 0 -- 512", "read - 0", "read - 0 1", "read -a 0 1", "read -p 0 1", "read -- -1 1", "read -P 1 -P 0 0 1",
	"write -x 1 2", "writev -x 1 2", "readv -s 0 0 1", "aio_read -x 1 2", "aio_write -n 1 2", "discard -x 1 2", "truncate -x 1", "truncate -m",
	"truncate -1", "reopen -x", "open -x", "open -t", "open -o",
	// Numbers.
	"read zz 1", "read 0 zz", "read 1k 1K", "read 0x200 0x10", "read 0X200 1", "read 010 1", "read 08 1", "read +1 1", "read ++1 1", "read +-1 1",
	"read 1.5k 1", "read 1.5 1", "read 1.0 1", "read 1.B 1", "read 1.5B 1", "read 0.1k 1", "read .5k 1", "read 1.k 1", "read 1.9999k 1",
	"read 1.5.5k 1", "read 0x1.8k 1", "read 0x 1", "read 00x1 1", "read 1e3 1", "read 1.5e1k 1", "read 1.e1k 1",
	"read 1.inf 1", "read 1.+5k 1", "read 1kb 1", "read 1kk 1", "read 1s 1", "read 1_0 1", "read 1,5k 1", "read 0b1 1", "read 0o7 1", "read 1b 1", "read 1B 1",
	"read 9E 1", "read 7E 1", "read 8191P 1", "read 8192P 1", "read 16E 1", "read 99999999999999999999 1", "read 99999999999999999999x 1",
	"read 9223372036854775807 1", "read 9223372036854775808 1", "read 0 2147483137", "read 0 2G", "read 0 9E",
	"read 4M 0", "read 4M 1", "read 5M 0", "read 4194303 1", "read 4194303 2",
	"alloc 7.9999999999E", "alloc 1.E", "alloc 1000001 10",
	// Patterns.
	"read -P 256 0 1", "read -P -1 0 1", "read -P x 0 1", "read -P 0x 0 1", "read -P 08 0 1", "read -P 0x1z 0 1", "read -P +0 0 1", "read -P 0b1 0 1",
	"read -P 0o1 0 1", "read -P 1_0 0 1", "read -P 99999999999999999999 0 1", "write -P 300 0 1", "writev -P 300 0 1", "aio_read -P 300 0 1",
	"read -l 1 0 1", "read -s 1 0 1", "read -P 0 -s 512 0 512", "read -P 0 -s 513 0 512", "read -P 0 -s 12 -l 500 0 512", "read -P 0 -s 13 -l 500 0 512",
	"read -P 1 -s 13 -l 5 0 512", "read -P 1 -l 0 0 512", "read -P 0 -l -1 0 512", "read -P 0 -l x 0 512", "read -P 0 -s x 0 512",
	"read -P 1 0 512; length", "readv -P 1 0 512 512", "read -qP 1 0 512", "readv -qP 1 0 512", "read -P 1 0 0", "readv -P 1 0 0 0",
	"write -P 1 64k 512; read -P 1 64k 512; read -P 1 64k 513; read -P 1 -l 512 64k 1k; read -P 0 -s 512 64k 1k",
	"write -P 0x41 0x10 0x10; read -v 0 40; read -v 1 16; read -vC 10 1; read -qv 0 16; readv -v 20 8 8 3; read -v 0 0; read -vP 1 0 16",
	"write -P 0x2f 0 1; write -P 0x30 1 1; write -P 0x39 2 1; write -P 0x3a 3 1; write -P 0x40 4 1; write -P 0x5a 5 1; write -P 0x5b 6 1; write -P 0x60 7 1; write -P 0x7a 8 1; write -P 0x7b 9 1; write -P 0xe1 10 1; read -v 0 16",
	"read -v 0x100 0x100", "read -v 4194288 16",
	// Writes.
	"write -b -z 0 512", "write -f -c 0 512", "write -f -b 0 512", "write -n 0 512", "write -u 0 512", "write -z -P 1 0 512", "write -s pattern -P 1 0 512",
	"write -zs pattern 0 512", "write -nb 0 512", "write -s none 0 512", "write -s /dev/null 0", "write -s", "write 1 -s",
	"write -s pattern 100 100; read -v 100 100", "write -s pattern 1M 70000; read -v 1114000 100",
	"write 0 3G", "write -z 0 3G", "write -zn 0 3G", "write 0 2G", "write 4M 1", "write -z 4M 1", "write 0 0", "write -z 0 0", "write -C 0 1", "write -q 0 1",
	"write -f 0 512", "write -zf 0 512", "write -p 0 512", "write -zu 0 128k; map", "write -z 100 100k; read -v 50 100; map", "write -zuC 0 1M", "write -zn 64k 64k",
	"write -P 1 256k 128k; write -zn 320k 100; read -P 1 320k 100; write -zn 300k 64k; write -zn 256k 100; write -zn 256k 64k; read -P 0 256k 64k; write -zn 256k 100; write -zn 300k 21k; write -znu 320k 64k; read -P 0 320k 64k",
	"writev 0 512 1k", "writev -P 0x61 10 1 2 3; read -v 0 32", "writev -C 0 1 2", "writev -f 0 512", "writev -q 0 512", "writev 4M 1", "writev x 1", "writev 0 x",
	"readv 0 2G", "readv 0 1G 1G", "readv 0 9E", "readv 0 1G 1023M 1M", "readv -C 0 1 2 3", "readv 4M 1", "readv 0 0 0",
	// Compressed writes.
	"write -c 0 100", "write -c 100 512", "write -c 512 512", "write -c 1M 512", "write -c -z 1M 1", "write -c 0 0", "write -c 4M 64k", "write -c 4032k 128k",
	"write -c -P 9 2M 64k; read -P 9 2M 64k; alloc 2M 64k; write -c -P 10 2M 64k; read -P 10 2M 64k; write -P 11 2M 1; write -c 2M 64k",
	"write -c -P 5 2112k 192k; read -P 5 2112k 192k", "write -c -s pattern 3M 64k; read -v 3M 50", "write -C -c 2432k 64k", "write -q -c 2496k 64k",
	// Where things are.
	"map", "alloc 0", "alloc 0 4M", "alloc 0 5M", "alloc 5M", "alloc 4M", "alloc x", "alloc 0 x", "alloc -1", "alloc 100k 100k", "alloc 0 0", "info", "length", "i", "a 64k 64k",
	// Discards and flushes.
	"discard 0 1", "discard 0 64k; map", "discard 0 2G", "discard 0 5M", "discard -q 64k 64k", "discard -C 64k 64k", "discard x 1", "discard 1 x", "discard 100 130k; read -v 90 20",
	"discard 4M 1", "discard 4M 0", "discard 0 0", "flush", "f",
	// Asynchronous ones, one at a time.
	"aio_write 0 512; length; aio_flush", "aio_read -P 0xcd 0 512; aio_flush", "aio_read -P 1 0 512; aio_flush", "aio_read -v 0 20; aio_flush", "aio_read -C 0 512; aio_flush",
	"aio_read -q 0 512; aio_flush", "aio_read 4M 512; aio_flush", "aio_write 4M 512; aio_flush", "aio_write -z 4M 512; aio_flush", "aio_write -z 128k 100; aio_flush", "aio_write -zu 0 64k; aio_flush",
	"aio_write -zf 0 512; aio_flush", "aio_write -f 0 512; aio_flush", "aio_write -C 0 512 512; aio_flush", "aio_write -z 0 1 2", "aio_write -u 0 1", "aio_write -zP 1 0 1", "aio_write -z 0 x",
	"aio_write 0 x", "aio_write x 1", "aio_write -i 0 1", "aio_read -i 0 1", "aio_read -i", "aio_read 0 0; aio_flush", "aio_write -z 0 9E", "aio_write -z 0 3G; aio_flush", "aio_read 0 1 2 3; aio_flush",
	"aio_write -P 7 3M 64k; close", "aio_write -P 7 3M 64k; reopen; read -P 7 3M 64k", "aio_write -P 7 3M 64k; quit", "aio_write 0 512; sleep 300; length",
	// Sizes.
	"truncate x", "truncate 9E", "truncate 1000", "truncate -m bogus 3M", "truncate 5M; length; map; truncate 4M; length; map",
	"truncate -m metadata 5M; map; truncate 4M", "truncate -m metadata 1M", "truncate -- 4M", "truncate 1536k; length; truncate 4M; map; read -P 0 1536k 1k",
	"truncate 0; length; map; alloc 0; read 0 0; read 0 1; truncate 4M; length",
	// Files.
	"close; length", "close; close", "close; map", "close; quit", "close; aio_flush", "close; sleep 1", "close; sigraise 0", "close; help a", "close; reopen", "close; break a b",
	"open a.qcow2", "open -r a.qcow2", "close; open a.qcow2; length", "close; o a.qcow2; c; length",
	"close; open -r a.qcow2; write 0 1; writev 0 1; aio_write 0 1; write -z 0 1; discard 0 1; truncate 1M; flush; write -x; write; read 0 1; aio_write -i 0 1",
	"close; open none; length", "close; open -t x a.qcow2", "close; open -d x a.qcow2", "close; open -i x a.qcow2", "close; open -i threads a.qcow2; length",
	"close; open -n a.qcow2; write 1 1; read -v 0 16", "close; open -t none a.qcow2; length", "close; open -t off a.qcow2; length", "close; open -t unsafe a.qcow2; write 0 1; flush",
	"close; open -t writethrough a.qcow2; write 0 1; write -z 64k 1; discard 0 64k", "close; open -t directsync a.qcow2; write 0 513",
	"close; open -o driver=raw a.qcow2; map; close", "close; open -o driver=qcow2,file.filename=a.qcow2; length; close", "close; open -o driver=qcow2,file.driver=file,file.filename=a.qcow2; length",
	"close; open -o x=y a.qcow2", "close; open -o driver=foo a.qcow2", "close; open -r; length",
	"close; open -U a.qcow2", "close; open -rU a.qcow2; length", "close; open -d ignore a.qcow2; write -P 3 0 64k; discard 0 64k; read -P 3 0 64k; write -zu 0 64k; read -P 0 0 64k; alloc 0 64k",
	"close; open -o discard=off a.qcow2; write -P 3 0 64k; discard 0 64k; read -P 3 0 64k", "close; open -d unmap a.qcow2; discard 0 64k; read -P 0 0 64k",
	"close; open -s a.qcow2; write -P 0x55 0 1M; read -P 0x55 0 1M; map; info; flush; close; open a.qcow2; read -P 0 0 64k", "close; open -s -r a.qcow2; write 0 1",
	"close; open -r -C a.qcow2", "close; open -o discard=x a.qcow2",
	"reopen", "reopen -r; write 0 1; reopen; write 0 1; reopen -w; write 0 1", "reopen -rw; write 0 1", "reopen -r -r", "reopen -c x", "reopen -c none; write 3 3; read 0 7", "reopen -c unsafe; write 0 1",
	"reopen -o x=y; length", "reopen -o discard=ignore; write -P 5 0 64k; discard 0 64k; read -P 5 0 64k; reopen -o discard=unmap; discard 0 64k; read -P 0 0 64k",
	"reopen -r -o read-only=on", "reopen -o cache.direct=on; write 1 1", "reopen -c none -o cache.direct=on", "reopen -o driver=raw", "reopen -o file.filename=x; length", "reopen -c writethrough; write 0 1", "reopen -o l2-cache-size=64k; read 1M 1; write 2M 1", "close; open -o driver=qcow2,l2-cache-size=1M a.qcow2; length",
	// The rest.
	"sleep 1", "sleep x", "sleep -1", "sleep 1x", "sleep 0x1", "sleep 1.5", "sleep 010", "sigraise x", "sigraise 66", "sigraise 64k", "sigraise -1", "sigraise 0", "sigraise 17", "sigraise 65", "sigraise 0x11", "sigraise 13",
	"break a b", "resume a", "remove_break a", "help foo", "help quit", "help help", "help length", "help alloc", "help map", "? a", "help", "quit", "quit; length", "q x y z; length", "foo; quit; length", "write -b 1 512", "read -b 0 1",
}
