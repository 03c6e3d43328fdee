//go:build ignore

// Package expr: this file takes the place of expr/queue.go of github.com/google/nftables v0.3.0 (bench/kube_network_policies/build).
//
// A kernel without CONFIG_NFT_QUEUE has no `queue` statement of nftables, but where it has CONFIG_NETFILTER_XT_TARGET_NFQUEUE
// and CONFIG_NFT_COMPAT the same queue is reached by the target NFQUEUE (revision 3), as iptables-nft does.
package expr

import (
	"encoding/binary"

	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

type QueueAttribute uint16

type QueueFlag uint16

const (
	QueueNum   QueueAttribute = unix.NFTA_QUEUE_NUM
	QueueTotal QueueAttribute = unix.NFTA_QUEUE_TOTAL
	QueueFlags QueueAttribute = unix.NFTA_QUEUE_FLAGS

	QueueFlagBypass QueueFlag = unix.NFT_QUEUE_FLAG_BYPASS
	QueueFlagFanout QueueFlag = unix.NFT_QUEUE_FLAG_CPU_FANOUT
	QueueFlagMask   QueueFlag = unix.NFT_QUEUE_FLAG_MASK
)

type Queue struct {
	Num   uint16
	Total uint16
	Flag  QueueFlag
}

// target is struct xt_NFQ_info_v3, padded to eight bytes; its flags have the numbers of nftables' own.
func (e *Queue) target() *Target {
	if e.Total == 0 {
		e.Total = 1
	}
	info := make([]byte, 8)
	binary.NativeEndian.PutUint16(info[0:], e.Num)
	binary.NativeEndian.PutUint16(info[2:], e.Total)
	binary.NativeEndian.PutUint16(info[4:], uint16(e.Flag))
	unknown := xt.Unknown(info)
	return &Target{Name: "NFQUEUE", Rev: 3, Info: &unknown}
}

func (e *Queue) marshal(fam byte) ([]byte, error) {
	return e.target().marshal(fam)
}

func (e *Queue) marshalData(fam byte) ([]byte, error) {
	return e.target().marshalData(fam)
}

// unmarshal: the program reads no rules back.
func (e *Queue) unmarshal(fam byte, data []byte) error {
	return e.target().unmarshal(fam, data)
}
