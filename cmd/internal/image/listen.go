package image

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"strings"

	"github.com/calfvm/calf/cmd/internal/socket"
)

// listen opens the socket that a server listens on.
func (o ServeOptions) listen() (net.Listener, error) {
	if o.Socket != "" {
		return socket.Listen(o.Socket)
	}
	addr, err := loopback(o.Bind)
	if err != nil {
		return nil, err
	}
	return net.Listen("tcp", netip.AddrPortFrom(addr, o.Port).String())
}

// loopback is the address that bind names. Others are refused: NBD knows neither
// users nor encryption.
func loopback(bind string) (netip.Addr, error) {
	if bind == "" || bind == "localhost" {
		bind = "127.0.0.1"
	}
	addr, err := netip.ParseAddr(bind)
	if err != nil || !addr.IsLoopback() {
		return addr, fmt.Errorf("refused to listen on %s: NBD has no protection, so only a loopback address can be served, such as 127.0.0.1 or ::1; from elsewhere go through a tunnel, such as ssh -L", bind)
	}
	return addr, nil
}

// uris are the addresses of the exports of a server that listens on addr.
func (o ServeOptions) uris(addr net.Addr) []string {
	uris := make([]string, 0, len(o.Exports))
	for _, e := range o.Exports {
		u := url.URL{Scheme: "nbd", Host: addr.String(), Path: "/" + e.Name}
		if o.Socket != "" {
			path, err := filepath.Abs(o.Socket)
			if err != nil {
				path = o.Socket
			}
			u.Scheme, u.Host = "nbd+unix", ""
			u.RawQuery = "socket=" + strings.NewReplacer("%2F", "/", "+", "%20").Replace(url.QueryEscape(path))
		}
		uris = append(uris, u.String())
	}
	return uris
}
