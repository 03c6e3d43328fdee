// The /agnhost of the image that the judges' pods run: Kubernetes' own agnhost, which is beside it, does all but one thing. Where
// the kernel has no SCTP sockets, `agnhost porter` and `agnhost connect --protocol=sctp` cannot do what they are asked for; here
// they speak it themselves, on raw sockets: the four-way handshake of RFC 9260 and an ABORT at its end, by IPv4. What judges it on
// its way are the packets, and these are the same.
package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"syscall"
	"time"
)

const (
	kubernetes = "/agnhost.kubernetes"
	protocol   = 132
	prefix     = "SERVE_SCTP_PORT_"
	// types of chunks, RFC 9260, 3.2
	chunkInit, chunkInitAck, chunkAbort, chunkCookieEcho, chunkCookieAck = 1, 2, 6, 10, 11
	parameterCookie                                                      = 7
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func main() {
	if hasSCTP() {
		instead()
	}
	switch {
	case len(os.Args) == 2 && os.Args[1] == "porter" && len(served()) > 0:
		fmt.Println("this kernel has no SCTP sockets: served on raw ones, ports", served())
		serve(served())
	case len(os.Args) > 2 && os.Args[1] == "connect":
		var destination, spoken string
		var timeout time.Duration
		for _, argument := range os.Args[2:] {
			name, value, _ := strings.Cut(argument, "=")
			switch name {
			case "--protocol":
				spoken = value
			case "--timeout":
				timeout, _ = time.ParseDuration(value)
			default:
				destination = argument
			}
		}
		if spoken == "sctp" {
			connect(destination, timeout)
		}
	}
	instead()
}

// Be Kubernetes' agnhost.
func instead() {
	err := syscall.Exec(kubernetes, os.Args, os.Environ())
	fail("OTHER: %s: %v", kubernetes, err)
}

func fail(format string, words ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", words...)
	os.Exit(1)
}

// Only the kernel's own word that there is no such protocol counts.
func hasSCTP() bool {
	descriptor, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, protocol)
	if err == nil {
		_ = syscall.Close(descriptor)
	}
	return !errors.Is(err, syscall.EPROTONOSUPPORT)
}

// The ports that the environment asks porter to serve.
func served() map[uint16]bool {
	ports := map[uint16]bool{}
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); strings.HasPrefix(name, prefix) {
			var port uint16
			if _, err := fmt.Sscan(strings.TrimPrefix(name, prefix), &port); err == nil {
				ports[port] = true
			}
		}
	}
	return ports
}

func raw() int {
	descriptor, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_RAW, protocol)
	if err != nil {
		fail("OTHER: raw socket: %v", err)
	}
	return descriptor
}

// What a packet says: its ports, its tag, its first chunk.
type packet struct {
	source, destination uint16
	tag                 uint32
	kind                byte
	value               []byte
}

func (it packet) bytes() []byte {
	data := make([]byte, 16, 16+len(it.value)+3)
	binary.BigEndian.PutUint16(data, it.source)
	binary.BigEndian.PutUint16(data[2:], it.destination)
	binary.BigEndian.PutUint32(data[4:], it.tag)
	data[12] = it.kind
	binary.BigEndian.PutUint16(data[14:], uint16(4+len(it.value)))
	data = append(data, it.value...)
	data = append(data, make([]byte, -len(data)&3)...)
	binary.LittleEndian.PutUint32(data[8:], crc32.Checksum(data, castagnoli))
	return data
}

// From what a raw socket receives: the header of IP comes first. Nothing where it is not whole.
func parse(data []byte) (it packet, whole bool) {
	if len(data) < 20 {
		return it, false
	}
	if data = data[4*int(data[0]&15):]; len(data) < 16 {
		return it, false
	}
	sum := binary.LittleEndian.Uint32(data[8:])
	clear(data[8:12])
	length := int(binary.BigEndian.Uint16(data[14:]))
	if sum != crc32.Checksum(data, castagnoli) || length < 4 || len(data) < 12+length {
		return it, false
	}
	return packet{
		binary.BigEndian.Uint16(data), binary.BigEndian.Uint16(data[2:]), binary.BigEndian.Uint32(data[4:]), data[12],
		data[16 : 12+length],
	}, true
}

// The fixed part of INIT and INIT ACK: our tag, a window, one stream each way, the first number.
func opening(tag uint32) []byte {
	value := binary.BigEndian.AppendUint32(nil, tag)
	value = binary.BigEndian.AppendUint32(value, 65536)
	value = binary.BigEndian.AppendUint32(value, 1<<16|1)
	return binary.BigEndian.AppendUint32(value, rand.Uint32())
}

// Answer for these ports, from the address that was asked. Nothing is remembered: the cookie has both tags.
func serve(ports map[uint16]bool) {
	receiver := raw()
	data := make([]byte, 65536)
	for {
		count, from, err := syscall.Recvfrom(receiver, data, 0)
		if err != nil {
			continue
		}
		it, whole := parse(data[:count])
		if !whole || !ports[it.destination] {
			continue
		}
		answer := packet{source: it.destination, destination: it.source}
		switch {
		case it.kind == chunkInit && len(it.value) >= 16:
			tag := rand.Uint32() | 1
			answer.kind, answer.tag = chunkInitAck, binary.BigEndian.Uint32(it.value)
			answer.value = binary.BigEndian.AppendUint32(opening(tag), parameterCookie<<16|12)
			answer.value = binary.BigEndian.AppendUint32(answer.value, answer.tag)
			answer.value = binary.BigEndian.AppendUint32(answer.value, tag)
		case it.kind == chunkCookieEcho && len(it.value) == 8 && binary.BigEndian.Uint32(it.value[4:]) == it.tag:
			answer.kind, answer.tag = chunkCookieAck, binary.BigEndian.Uint32(it.value)
		default:
			continue
		}
		sender := raw()
		asked := &syscall.SockaddrInet4{Addr: [4]byte(data[16:20])}
		if err = syscall.Bind(sender, asked); err == nil {
			err = syscall.Sendto(sender, answer.bytes(), 0, from)
		}
		if err != nil {
			fmt.Println("not answered:", err)
		}
		_ = syscall.Close(sender)
	}
}

// As agnhost's connect: silent and 0 where it is connected, else a word and 1.
func connect(destination string, timeout time.Duration) {
	to, err := net.ResolveTCPAddr("tcp4", destination)
	if err != nil {
		fail("DNS: %v", err)
	}
	descriptor := raw()
	// errors of ICMP are answers, too
	_ = syscall.SetsockoptInt(descriptor, syscall.IPPROTO_IP, syscall.IP_RECVERR, 1)
	again := syscall.NsecToTimeval((200 * time.Millisecond).Nanoseconds())
	_ = syscall.SetsockoptTimeval(descriptor, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &again)
	if err = syscall.Connect(descriptor, &syscall.SockaddrInet4{Addr: [4]byte(to.IP.To4())}); err != nil {
		fail("OTHER: %v", err)
	}
	own := rand.Uint32() | 1
	asked := packet{uint16(32768 + rand.IntN(28000)), uint16(to.Port), 0, chunkInit, opening(own)}
	data := make([]byte, 65536)
	for until := time.Now().Add(timeout); timeout == 0 || time.Now().Before(until); {
		if _, err = syscall.Write(descriptor, asked.bytes()); err != nil && !errors.Is(err, syscall.EPERM) {
			fail("OTHER: %v", err)
		}
		for sent := time.Now(); time.Since(sent) < 500*time.Millisecond; {
			count, err := syscall.Read(descriptor, data)
			if errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.EINTR) {
				continue
			} else if errors.Is(err, syscall.ECONNREFUSED) {
				fail("REFUSED")
			} else if err != nil {
				fail("OTHER: %v", err)
			}
			it, whole := parse(data[:count])
			if !whole || it.tag != own || it.source != asked.destination || it.destination != asked.source {
				continue
			}
			if it.kind == chunkInitAck && asked.kind == chunkInit && len(it.value) > 20 {
				// the cookie is the only parameter that we send
				asked.kind, asked.tag, asked.value = chunkCookieEcho, binary.BigEndian.Uint32(it.value), append([]byte{}, it.value[20:]...)
				break
			} else if it.kind == chunkCookieAck {
				asked.kind, asked.value = chunkAbort, nil
				_, _ = syscall.Write(descriptor, asked.bytes())
				os.Exit(0)
			}
		}
	}
	fail("TIMEOUT")
}
