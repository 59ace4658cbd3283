// emulated_<sanitizer> [CASE...]: runs the named cases, or all of them, and prints a line for each.
#include <cstring>

#include "emulated.h"

int main(int argc, char** argv) {
  int found = 0;
  for (const gear::emulated::Case& one : gear::emulated::cases()) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted = wanted || std::strcmp(argv[i], one.name) == 0;
    if (!wanted) continue;
    one.run();
    std::printf("ok %s\n", one.name);
    ++found;
  }
  return found == 0 || found < argc - 1;
}
