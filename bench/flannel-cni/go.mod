// flannel's CNI plugin, in the last release that carried it beside the other plugins (its own module is not on the proxy).
module overlay/bench/flannel-cni

go 1.24

require github.com/containernetworking/plugins v0.9.1

require github.com/containernetworking/cni v0.8.1 // indirect

tool github.com/containernetworking/plugins/plugins/meta/flannel
