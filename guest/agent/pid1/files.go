package pid1

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/guest/agent/internal/archive"
	"github.com/calfvm/calf/guest/agent/internal/wire"
)

// copyIn unpacks what the host sends, for the user that runs the command.
func (c *command) copyIn() error {
	owner := &archive.Owner{UID: int(c.who.credential.Uid), GID: int(c.who.credential.Gid)}
	for i, dest := range c.start.Copies {
		in, err := dial(wire.Copy, i)
		if err != nil {
			return err
		}
		if err = errors.Join(archive.Unpack(in, dest, owner), in.Close()); err != nil {
			return fmt.Errorf("copying to %s in the guest: %w", dest, err)
		}
	}
	return nil
}

// copyOut sends the host what it wants, and returns how much of that it has begun to
// send. The host is told of what cannot be had.
func (c *command) copyOut() (begun int) {
	for i, name := range c.start.Artifacts {
		out, err := dial(wire.Artifact, i)
		if err == nil {
			begun++
			err = archive.Pack(out, name)
			_ = unix.Shutdown(int(out.Fd()), unix.SHUT_WR)
			_ = out.Close()
		}
		if err != nil {
			c.host.tell(wire.Problem{Kind: wire.ArtifactLost, Text: fmt.Sprintf("artifact %s: %v", name, err), Index: i})
		}
	}
	return begun
}
