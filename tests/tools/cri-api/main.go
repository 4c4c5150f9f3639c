// Writes the compiled descriptors of upstream's CRI v1, a FileDescriptorSet in protobuf's binary form, to stdout.
//
// It says what upstream ships and judges nothing: tests/conformance/cri_descriptors.rs compares it with ours. Which
// upstream is pinned in go.mod.
package main

import (
	"fmt"
	"os"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func main() {
	// Any message leads to the file; the file's own variable has upstream's build path in its name.
	file := (&runtime.VersionRequest{}).ProtoReflect().Descriptor().ParentFile()
	set := &descriptorpb.FileDescriptorSet{
		File: []*descriptorpb.FileDescriptorProto{protodesc.ToFileDescriptorProto(file)},
	}
	encoded, err := proto.MarshalOptions{Deterministic: true}.Marshal(set)
	if err == nil {
		_, err = os.Stdout.Write(encoded)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "cri-descriptors:", err)
		os.Exit(1)
	}
}
