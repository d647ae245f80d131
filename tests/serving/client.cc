// Serves a SavedModel through TensorFlow's C API, as a server without Python does:
//
//   client <saved model> <op library, or - for none> <input tensor name> <output tensor name> <file> <dimension>...
//
// Reads the float32 input of the given dimensions from <file>, and writes the output over it. test_client.py
// compiles it against an installed TensorFlow.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "tensorflow/c/c_api.h"

namespace {

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
  const TF_Output input = find(graph, argv[3]), output = find(graph, argv[4]);

  const std::vector<std::int64_t> shape = [&] {
    std::vector<std::int64_t> dimensions;
    for (int i = 6; i < argc; ++i) dimensions.push_back(std::stoll(argv[i]));
    return dimensions;
  }();
  std::ifstream file(argv[5], std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  TF_Tensor* fed = TF_AllocateTensor(TF_FLOAT, shape.data(), static_cast<int>(shape.size()), bytes.size());
  std::copy(bytes.begin(), bytes.end(), static_cast<char*>(TF_TensorData(fed)));

  TF_Tensor* fetched = nullptr;
  TF_SessionRun(session, nullptr, &input, &fed, 1, &output, &fetched, 1, nullptr, 0, nullptr, status.get());
  check("TF_SessionRun");
  std::ofstream(argv[5], std::ios::binary)
      .write(static_cast<const char*>(TF_TensorData(fetched)), TF_TensorByteSize(fetched));

  TF_DeleteTensor(fed);
  TF_DeleteTensor(fetched);
  TF_DeleteSession(session, status.get());
  TF_DeleteSessionOptions(options);
  TF_DeleteGraph(graph);
  check("TF_DeleteSession");
}
