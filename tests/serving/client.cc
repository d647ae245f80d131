// Serves a SavedModel through TensorFlow's C API, as a server without Python does:
//
//   client <saved model> <op library, or - for none> <input tensor> <output tensor> <file> <dimension>... [-- <state>...]
//
// Reads float32 inputs of the given dimensions from <file>, as many as there are, runs the model on one after the other, and
// writes the outputs over them. A <state> is three tensors: where it is before the first run, what a run gives, and what
// the next run takes. What a model keeps in variables needs none. test_client.py compiles it against an installed TensorFlow.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tensorflow/c/c_api.h"

namespace {

using Tensor = std::unique_ptr<TF_Tensor, decltype(&TF_DeleteTensor)>;

const std::unique_ptr<TF_Status, decltype(&TF_DeleteStatus)> status(TF_NewStatus(), TF_DeleteStatus);

void check(const char* step) {
  if (TF_GetCode(status.get()) == TF_OK) return;
  std::fprintf(stderr, "%s: %s\n", step, TF_Message(status.get()));
  std::exit(1);
}

TF_Output find(TF_Graph* graph, const std::string& tensor) {  // "operation:index"
  const auto colon = tensor.rfind(':');
  TF_Operation* operation = TF_GraphOperationByName(graph, tensor.substr(0, colon).c_str());
  if (operation == nullptr) TF_SetStatus(status.get(), TF_NOT_FOUND, tensor.c_str());
  check("TF_GraphOperationByName");
  return {operation, std::stoi(tensor.substr(colon + 1))};
}

std::vector<Tensor> run(TF_Session* session, const std::vector<TF_Output>& inputs, const std::vector<Tensor>& fed,
                        const std::vector<TF_Output>& outputs) {
  std::vector<TF_Tensor*> given, fetched(outputs.size(), nullptr);
  for (const Tensor& tensor : fed) given.push_back(tensor.get());
  TF_SessionRun(session, nullptr, inputs.data(), given.data(), static_cast<int>(inputs.size()), outputs.data(),
                fetched.data(), static_cast<int>(outputs.size()), nullptr, 0, nullptr, status.get());
  check("TF_SessionRun");
  std::vector<Tensor> results;
  for (TF_Tensor* tensor : fetched) results.emplace_back(tensor, TF_DeleteTensor);
  return results;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 7) return 2;
  if (std::string(argv[2]) != "-") TF_LoadLibrary(argv[2], status.get());
  check("TF_LoadLibrary");

  TF_Graph* graph = TF_NewGraph();
  TF_SessionOptions* options = TF_NewSessionOptions();
  const char* tags[] = {"serve"};
  TF_Session* session =
      TF_LoadSessionFromSavedModel(options, nullptr, argv[1], tags, 1, graph, nullptr, status.get());
  check("TF_LoadSessionFromSavedModel");

  std::vector<std::int64_t> shape;
  std::size_t bytes = sizeof(float);
  int at = 6;
  for (; at < argc && std::string(argv[at]) != "--"; ++at) {
    shape.push_back(std::stoll(argv[at]));
    bytes *= static_cast<std::size_t>(shape.back());
  }
  std::vector<TF_Output> inputs{find(graph, argv[3])}, outputs{find(graph, argv[4])}, first;
  for (++at; at + 2 < argc; at += 3) {
    first.push_back(find(graph, argv[at]));
    outputs.push_back(find(graph, argv[at + 1]));
    inputs.push_back(find(graph, argv[at + 2]));
  }

  std::ifstream file(argv[5], std::ios::binary);
  const std::vector<char> data{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  std::ofstream results(argv[5], std::ios::binary);
  std::vector<Tensor> state;
  if (!first.empty()) state = run(session, {}, {}, first);
  for (std::size_t begin = 0; begin + bytes <= data.size(); begin += bytes) {
    Tensor input(TF_AllocateTensor(TF_FLOAT, shape.data(), static_cast<int>(shape.size()), bytes), TF_DeleteTensor);
    std::copy_n(data.data() + begin, bytes, static_cast<char*>(TF_TensorData(input.get())));
    state.insert(state.begin(), std::move(input));
    state = run(session, inputs, state, outputs);
    results.write(static_cast<const char*>(TF_TensorData(state[0].get())),
                  static_cast<std::streamsize>(TF_TensorByteSize(state[0].get())));
    state.erase(state.begin());
  }

  TF_DeleteSession(session, status.get());
  TF_DeleteSessionOptions(options);
  TF_DeleteGraph(graph);
  check("TF_DeleteSession");
}
