"""nftables: messages, the socket, the nft program; and the old iptables."""
